.POSIX:

# `make` lists the targets. Variables, as in `make demo DEMO='--listen 127.0.0.1:8888'`:
#   DEMO   arguments of `tidegate demo`
#   WORKLOAD, PEERS, ROUNDS, SECONDS  arguments of `make bench`, as in `make bench WORKLOAD=hit-1k
#          PEERS=nginx,haproxy`; empty: the defaults shown by `loadtest bench --help`
#   WRITE  directory for the figures of `make bench`; empty: they are not stored
#   DIST   directory of `make dist`; CARGO_FLAGS are added to its build, as in
#          CARGO_FLAGS='--config profile.release.lto=false' for a quick one
#   NAME   scenario of `make scenario`: hot-region, remote, large-bodies, knee, floods
#   CARGO  the cargo to use; CARGO_TARGET_DIR is honoured as cargo does

CARGO = cargo
DEMO =
WORKLOAD =
PEERS =
ROUNDS =
SECONDS =
WRITE = docs/performance
NAME = hot-region
DIST = dist
CARGO_FLAGS =
# Cargo's output directory, expanded by the shell.
OUT = $${CARGO_TARGET_DIR:-target}

.PHONY: help demo build test lint bench scenario loadtest dist dist-check docs clean

help: ## list these targets
	@echo 'make TARGET, with TARGET one of'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s  %s\n", $$1, $$2 }' Makefile

# A build without optimisation and without jemalloc takes a fraction of the time and differs in speed and memory only.
demo: ## build (unoptimised, which is quicker) and start the gateway with a built-in origin; prints commands to try
	@.ci/need cc:gcc curl:curl
	$(CARGO) build --profile demo --package gateway --no-default-features
	@exec "$(OUT)/demo/tidegate" demo $(DEMO)

build: ## build target/release/tidegate, optimised
	$(CARGO) build --release --package gateway

# .ci/run measures the time between lines that begin with `==`.
test: ## all checks: format, clippy, unit and scenario tests, the chart
	@echo '== packages'
	@.ci/need cc:gcc git:git kill:procps redis-server:redis-server curl:curl nghttp:nghttp2-client strace:strace \
	    faketime:faketime haproxy:haproxy nginx:nginx openssl:openssl python3:python3 promtool:prometheus \
	    '/usr/lib/python3*/ensurepip:python3-venv'
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
	    echo 'Put helm on the PATH, or install Go: helm/check.sh then builds helm (about 3 minutes, once).'; \
	fi

lint: ## format, clippy, and licences and advisories where cargo-deny is installed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check; \
	else echo 'SKIPPED: cargo deny is not installed (cargo install --locked cargo-deny)'; fi

# Builds both first, so that no compilation disturbs the measurement. The figures name the commit: commit first.
bench: ## compare with nginx, haproxy, varnish, envoy, caddy on this machine, as ratios; WORKLOAD=hit-1k PEERS=nginx,haproxy narrows it
	@.ci/need nginx:nginx haproxy:haproxy varnishd:varnish \
	    '/usr/lib/*/varnish/vmods/libvmod_vsthrottle.so:varnish-modules' wrk:wrk \
	    h2load:nghttp2-client curl:curl openssl:openssl perf:linux-perf
	@.ci/peers
	$(CARGO) build --release --package gateway
	$(CARGO) build --release --package loadtest
	@"$(OUT)/release/loadtest" bench $(WORKLOAD:%=--workload=%) $(PEERS:%=--peers=%) \
	    $(ROUNDS:%=--rounds=%) $(SECONDS:%=--seconds=%) $(WRITE:%=--write=%)

scenario: ## run a scenario with real Redis servers on this machine, prints tables; NAME=hot-region, remote, large-bodies, knee, floods
	@.ci/need redis-server:redis-server wrk:wrk
	$(CARGO) build --release --package gateway
	$(CARGO) build --release --package loadtest
	@"$(OUT)/release/loadtest" scenario $(NAME) $(ROUNDS:%=--rounds=%) $(SECONDS:%=--seconds=%)

loadtest: ## release build, then k6 and wrk against `tidegate demo`
	@.ci/need curl:curl wrk:wrk
	$(CARGO) build --release --package gateway
	loadtest/run.sh "$(OUT)/release/tidegate"

dist: ## release in dist/: static program, Debian package, container image, SBOM, checksums (about 10 minutes)
	@.ci/need python3:python3 strip:binutils dpkg-deb:dpkg cc:gcc
	CARGO='$(CARGO)' CARGO_FLAGS='$(CARGO_FLAGS)' gateway/packaging/dist.sh '$(DIST)'

dist-check: ## run and install what `make dist` has written
	@.ci/need python3:python3 readelf:binutils curl:curl debootstrap:debootstrap
	gateway/packaging/check.sh '$(DIST)'

docs: ## regenerate the generated parts of docs/ from the code
	UPDATE_DOCS=1 $(CARGO) test --package limiter --test simulation picture
	UPDATE_DOCS=1 $(CARGO) test --package gateway --lib config::reference
	UPDATE_DOCS=1 $(CARGO) test --package gateway --lib simulation
	UPDATE_DOCS=1 $(CARGO) test --package gateway --test conformance page

clean: ## remove build output
	$(CARGO) clean
