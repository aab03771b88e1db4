.POSIX:

# `make` lists the targets. Variables, as in `make demo DEMO='--listen 127.0.0.1:8888'`:
#   DEMO   arguments of `tidegate demo`
#   WORKLOAD, PEERS, ROUNDS, SECONDS  arguments of `make bench`, as in `make bench WORKLOAD=hit-1k
#          PEERS=nginx,haproxy`; empty: the defaults shown by `loadtest bench --help`
#   WRITE  directory for the figures of `make bench`; empty: they are not stored
#   ONLY   field cases of `make field-cases`, separated by commas; empty: all
#   FORM   --short, or empty for the long forms
#   DIST   directory of `make dist`; CARGO_FLAGS are added to its build, as in
#          CARGO_FLAGS='--config profile.release.lto=false' for a quick one
#   NAME   scenario of `make scenario`: hot-region, remote, large-bodies, knee, floods, features
#   K6     arguments of `loadtest/k6/run` in `make k6`, as in `make k6 K6='all --short'`
#   TESTS  test programs of `make tests`, as in `make tests TESTS='gateway/cache shard/redis'`; empty: all
#   CARGO  the cargo to use; CARGO_TARGET_DIR is honoured as cargo does

CARGO = cargo
DEMO =
WORKLOAD =
PEERS =
ROUNDS =
SECONDS =
WRITE = docs/performance
NAME = hot-region
ONLY =
FORM = --short
K6 = representative --short
DIST = dist
CARGO_FLAGS =
TESTS =
# Cargo's output directory, expanded by the shell.
OUT = $${CARGO_TARGET_DIR:-target}

.PHONY: help demo build test tests lint bench scenario loadtest k6 field-cases test-kubernetes dist dist-check dist-reproduce docs clean

help: ## list these targets
	@echo 'make TARGET, with TARGET one of'
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-15s  %s\n", $$1, $$2 }' Makefile

# A build without optimisation and without jemalloc takes a fraction of the time and differs in speed and memory only.
demo: ## build (unoptimised, which is quicker) and start the gateway with a built-in origin; prints commands to try
	@.ci/need cc:gcc curl:curl
	$(CARGO) build --profile demo --package gateway --no-default-features
	@exec "$(OUT)/demo/tidegate" demo $(DEMO)

build: ## build target/release/tidegate, optimised, with discovery by Kubernetes
	$(CARGO) build --release --package gateway --features kubernetes

# .ci/run measures the time between lines that begin with `==`. The chart and k6 use the programs that the tests have
# built: without the features of the tests' dependencies, cargo would build them again.
test: ## all checks: format, clippy, unit and scenario tests, the chart, load tests in short form
	@echo '== packages'
	@.ci/need cc:gcc git:git kill:procps redis-server:redis-server curl:curl nghttp:nghttp2-client strace:strace \
	    faketime:faketime haproxy:haproxy nginx:nginx openssl:openssl python3:python3 promtool:prometheus \
	    '/usr/lib/python3*/ensurepip:python3-venv'
	@.ci/tools start
	@echo '== format'
	$(CARGO) fmt --all --check
	@echo '== clippy'
	$(CARGO) clippy --workspace --all-targets --features gateway/kubernetes -- -D warnings
	@echo '== build of the tests'
	CARGO='$(CARGO)' .ci/tests --build-only
	@echo '== tests'
	CARGO='$(CARGO)' .ci/tests
	@echo '== orders'
	RUSTFLAGS='--cfg loom' $(CARGO) test --package limiter --test orders --target-dir "$(OUT)/loom" \
	    --config 'profile.dev.package."*".opt-level=0'
	@echo '== tools of the chart and of k6'
	@.ci/tools wait
	@echo '== chart'
	helm/check.sh "$(OUT)/debug/tidegate"
	@echo '== k6'
	loadtest/k6/run representative --short --programs "$(OUT)/debug" --skip-without-k6

tests: ## unit and scenario tests alone, several programs at a time; TESTS='gateway/cache shard/lib' narrows it
	CARGO='$(CARGO)' .ci/tests $(TESTS)

lint: ## format, clippy, and licences and advisories where cargo-deny is installed
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --features gateway/kubernetes -- -D warnings
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

scenario: ## run a scenario with real Redis servers on this machine, prints tables; NAME=hot-region, remote, large-bodies, knee, floods, features
	@.ci/need redis-server:redis-server wrk:wrk
	@if [ '$(NAME)' = features ]; then .ci/need valgrind:valgrind; fi
	$(CARGO) build --release --package gateway
	$(CARGO) build --release --package loadtest
	@"$(OUT)/release/loadtest" scenario $(NAME) $(ROUNDS:%=--rounds=%) $(SECONDS:%=--seconds=%)

loadtest: ## release build, then k6 and wrk against `tidegate demo`
	@.ci/need curl:curl wrk:wrk
	$(CARGO) build --release --package gateway
	loadtest/run.sh "$(OUT)/release/tidegate"

# The cluster is that of the current kubeconfig; helm/test-kubernetes.sh lists the variables.
test-kubernetes: ## test the chart on a real cluster, IMAGE=registry.example/tidegate:TAG; writes figures to docs/kubernetes.md
	WRITE=docs/kubernetes.md helm/test-kubernetes.sh

k6: ## k6 scripts with real servers on this machine: the short form of some; K6='all --short', K6=soak (loadtest/k6/README.md)
	@.ci/need redis-server:redis-server python3:python3 faketime:faketime
	$(CARGO) build --package gateway --package loadtest
	loadtest/k6/run $(K6) --programs "$(OUT)/debug"

# ONLY narrows it, as in `make field-cases ONLY=knee,cancel`; FORM= plays the long forms.
field-cases: ## play the twelve field cases with real processes, writes docs/field-cases.md; ONLY=knee,cancel narrows it
	@.ci/need redis-server:redis-server wrk:wrk faketime:faketime
	$(CARGO) build --release --package gateway
	$(CARGO) build --release --package loadtest
	@"$(OUT)/release/loadtest" field-cases $(FORM) $(ONLY:%=--only=%) --write docs

dist: ## release in dist/: static program, Debian package, container image, SBOM, checksums (about 10 minutes)
	@.ci/need python3:python3 strip:binutils dpkg-deb:dpkg cc:gcc
	CARGO='$(CARGO)' CARGO_FLAGS='$(CARGO_FLAGS)' gateway/packaging/dist.sh '$(DIST)'

dist-check: ## run and install what `make dist` has written
	@.ci/need python3:python3 readelf:binutils curl:curl debootstrap:debootstrap
	gateway/packaging/check.sh '$(DIST)'

dist-reproduce: ## build what `make dist` has written a second time, elsewhere, and compare the bytes
	CARGO='$(CARGO)' CARGO_FLAGS='$(CARGO_FLAGS)' gateway/packaging/reproduce.sh '$(DIST)'

docs: ## regenerate the generated parts of docs/ from the code
	UPDATE_DOCS=1 $(CARGO) test --package limiter --test simulation picture
	UPDATE_DOCS=1 $(CARGO) test --package limiter --test simulation scale_page
	UPDATE_DOCS=1 $(CARGO) test --package shard --lib scale_page
	UPDATE_DOCS=1 $(CARGO) test --package gateway --lib config::reference
	UPDATE_DOCS=1 $(CARGO) test --package gateway --lib simulation
	UPDATE_DOCS=1 $(CARGO) test --package gateway --test conformance page

clean: ## remove build output
	$(CARGO) clean
