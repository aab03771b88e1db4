.POSIX:

# `make` alone lists what there is. Variables, as in `make demo DEMO='--listen 127.0.0.1:8888'`:
#   DEMO   arguments of `tidegate demo`
#   WORKLOAD, PEERS, ROUNDS, SECONDS  what `make bench` measures, as in `make bench WORKLOAD=hit-1k PEERS=nginx,haproxy`: empty
#          takes the default, which `loadtest bench --help` tells    WRITE  where its figures are kept; empty: nowhere
#   NAME   which scenario `make scenario` plays: hot-region, remote, large-bodies
#   CARGO  the cargo to use; CARGO_TARGET_DIR is honoured as cargo does

CARGO = cargo
DEMO =
WORKLOAD =
PEERS =
ROUNDS =
SECONDS =
WRITE = docs/performance
NAME = hot-region
# Where cargo puts what it builds, as the shell sees it.
OUT = $${CARGO_TARGET_DIR:-target}

.PHONY: help demo build test lint bench scenario loadtest docs clean

help: ## list these targets
	@echo 'make TARGET, with TARGET one of'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-9s  %s\n", $$1, $$2 }' Makefile

# A debug build: it is ready in a fraction of the time that link-time optimisation takes, and behaves the same but for speed.
demo: ## build (unoptimised, which is quicker) and start the gateway with an origin of its own; says what to try
	$(CARGO) build --package gateway
	@exec "$(OUT)/debug/tidegate" demo $(DEMO)

build: ## build target/release/tidegate, optimised
	$(CARGO) build --release --package gateway

# The lines that begin with `==` are what .ci/run takes the time of.
test: ## everything that must hold: format, clippy, unit and scenario tests, the chart
	@echo '== packages'
	@.ci/need redis-server:redis-server curl:curl nghttp:nghttp2-client strace:strace faketime:faketime
	@echo '== format'
	$(CARGO) fmt --all --check
	@echo '== clippy'
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@echo '== tests'
	$(CARGO) test --workspace
	@echo '== orders'
	RUSTFLAGS='--cfg loom' $(CARGO) test --package limiter --test orders --target-dir "$(OUT)/loom" \
	    --config 'profile.dev.package."*".opt-level=0'
	@echo '== chart'
	@if PATH="$$HOME/.cache/tidegate/bin:$$PATH" command -v helm >/dev/null || command -v go >/dev/null; then \
	    [ -x "$(OUT)/debug/tidegate" ] || $(CARGO) build --package gateway || exit 1; \
	    helm/check.sh "$(OUT)/debug/tidegate"; \
	else \
	    echo 'SKIPPED: the chart was not checked, because neither helm nor go is installed.'; \
	    echo 'Put helm on the PATH, or install Go: helm/check.sh then builds helm by itself (about 3 minutes, once).'; \
	fi

lint: ## format, clippy, and licences and advisories where cargo-deny is installed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check; \
	else echo 'SKIPPED: cargo deny is not installed (cargo install --locked cargo-deny)'; fi

# Both are built first: nothing compiles while something is measured. The figures name the commit, so commit first.
bench: ## compare with nginx, haproxy, varnish on this machine, as ratios; WORKLOAD=hit-1k PEERS=nginx,haproxy narrows it
	@.ci/need nginx:nginx haproxy:haproxy varnishd:varnish \
	    '/usr/lib/*/varnish/vmods/libvmod_vsthrottle.so:varnish-modules' wrk:wrk
	$(CARGO) build --release --package gateway
	$(CARGO) build --release --package loadtest
	@"$(OUT)/release/loadtest" bench $(WORKLOAD:%=--workload=%) $(PEERS:%=--peers=%) \
	    $(ROUNDS:%=--rounds=%) $(SECONDS:%=--seconds=%) $(WRITE:%=--write=%)

scenario: ## a field case with real Redis servers on this machine, in tables; NAME=hot-region, remote, large-bodies
	@.ci/need redis-server:redis-server wrk:wrk
	$(CARGO) build --release --package gateway
	$(CARGO) build --release --package loadtest
	@"$(OUT)/release/loadtest" scenario $(NAME) $(ROUNDS:%=--rounds=%) $(SECONDS:%=--seconds=%)

loadtest: ## release build, then k6 and wrk against `tidegate demo`
	@.ci/need curl:curl wrk:wrk
	$(CARGO) build --release --package gateway
	loadtest/run.sh "$(OUT)/release/tidegate"

docs: ## write the generated parts of docs/ anew from the code
	UPDATE_DOCS=1 $(CARGO) test --package limiter --test simulation picture
	UPDATE_DOCS=1 $(CARGO) test --package gateway --lib config::reference
	UPDATE_DOCS=1 $(CARGO) test --package gateway --test conformance page

clean: ## remove what was built
	$(CARGO) clean
