# make demo    a real model, two real containers, one copy: start here
# make test    everything that is tested, on real engines and real file systems (root)
# make bench   what it costs, beside what people do without Larder (root)
# make build   bin/larder, bin/larder-plugin and bin/larder-sidecar, static
# make gpu     bin/larder-gpu, which tells who uses NVIDIA GPUs (cgo; for nodes that have some)

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

GO      ?= go
PREFIX  ?= /usr/local
UNITDIR ?= /etc/systemd/system
DESTDIR ?=

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)

PROGRAMS := larder larder-plugin larder-sidecar

# Flags for the benchmarks and the demo: make bench BENCH="--quick --json".
BENCH ?=
MODEL ?=

# Two test programs at a time: each of them starts engines, mounts and
# processes of its own.
TEST_JOBS    ?= 2
TEST_TIMEOUT ?= 30m
APART        := unshare --mount --propagation shared --

.PHONY: build
build: ## static programs in bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/larder ./cmd/larder
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/larder-plugin ./plugin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/larder-sidecar ./sidecar

# NVIDIA's library is opened when the program runs, so it builds anywhere; its
# symbols must stay unresolved until they are called.
GPU_FLAGS := -tags nvml -trimpath -ldflags '-s -w -extldflags=-Wl,-z,lazy'

.PHONY: gpu
gpu: export CGO_CFLAGS = -O2 -Wno-deprecated-declarations
gpu: ## the helper that lists processes on GPUs
	CGO_ENABLED=1 $(GO) build $(GPU_FLAGS) -o bin/larder-gpu ./cmd/larder-gpu

.PHONY: demo
demo: ## on a bare Debian machine too: installs what is missing, cleans up after itself
	MODEL='$(MODEL)' GO='$(GO)' test/demo/demo.sh

.PHONY: setup
setup: ## what the tests need of the machine: packages, a current Docker engine
	test/setup.sh

# A skipped test counts as a failure here: test/report runs go test, prints its
# lines and refuses a run in which anything was skipped or nothing ran.
#
# The packages of internal/ come first and side by side; those of test/ start
# engines and fill disks, and have the machine to themselves; their tests mostly
# wait for engines, so more of them run at a time than there are cores.
# All in a mount namespace of its own, with shared mounts as systemd makes them:
# elsewhere each container that starts would hold a copy of every mount of the
# tests beside it, for the moment until it changes its root.
#
# Tests run themselves as processes that are killed at each step, which the tag
# "faults" builds in; with -race each that ends by itself would sleep a second
# first (GORACE).
.PHONY: test
test: export LARDER_TEST_ALL = 1
test: export GORACE = atexit_sleep_ms=0
test: setup build gpu vet
	$(APART) $(GO) run ./test/report -- $(GO) test -tags faults -race -count=1 -timeout $(TEST_TIMEOUT) -p $(TEST_JOBS) \
		$$($(GO) list ./... | grep -v '/larder/test/')
	$(APART) $(GO) run ./test/report -- $(GO) test -tags faults -race -count=1 -timeout $(TEST_TIMEOUT) -p 1 -parallel 4 \
		$$($(GO) list ./... | grep '/larder/test/')
	CGO_CFLAGS='-O2 -Wno-deprecated-declarations' $(GO) run ./test/report -- \
		$(GO) test -race -count=1 -tags nvml ./cmd/larder-gpu

.PHONY: vet
vet:
	@unformatted=$$(gofmt -l cmd internal plugin sidecar test); \
	if [ -n "$$unformatted" ]; then echo "gofmt these files:" $$unformatted; exit 1; fi
	$(GO) vet ./...
	$(GO) vet -tags faults ./...
	CGO_CFLAGS='-O2 -Wno-deprecated-declarations' $(GO) vet -tags nvml ./cmd/larder-gpu

.PHONY: bench
bench: setup build
	CGO_ENABLED=0 $(GO) run ./test/bench $(BENCH)

# Each fuzz target for a while: make fuzz FUZZTIME=10m. make test runs their seeds.
FUZZTIME ?= 20s
.PHONY: fuzz
fuzz:
	@for pkg in $$($(GO) list ./internal/...); do \
		for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			echo "$$pkg $$target"; $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done

.PHONY: lint
lint:
	golangci-lint run ./...

.PHONY: install
install: build ## programs, systemd units, shell completion
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(UNITDIR) $(DESTDIR)/etc/larder
	install -m 0755 $(addprefix bin/,$(PROGRAMS)) $(wildcard bin/larder-gpu) $(DESTDIR)$(PREFIX)/bin/
	for unit in larder-plugin.socket larder-plugin.service larder-sidecar.service; do \
		sed 's|/usr/local/bin/|$(PREFIX)/bin/|g' deploy/systemd/$$unit > $(DESTDIR)$(UNITDIR)/$$unit; \
		chmod 0644 $(DESTDIR)$(UNITDIR)/$$unit; \
	done
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	bin/larder completion bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/larder
	bin/larder completion zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_larder
	bin/larder completion fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/larder.fish
	@echo 'Now: systemctl daemon-reload && systemctl enable --now larder-plugin.socket larder-sidecar'

.PHONY: image
image: build ## the sidecar as a container image; see deploy/container/Dockerfile
	DOCKER_BUILDKIT=0 docker build -t larder-sidecar:$(VERSION) -f deploy/container/Dockerfile bin

.PHONY: plugin
plugin: build ## a folder for "docker plugin create larder:latest out/plugin"
	rm -rf out/plugin
	install -d out/plugin/rootfs/etc/ssl/certs out/plugin/rootfs/tmp out/plugin/rootfs/run \
		out/plugin/rootfs/var/lib/larder out/plugin/rootfs/mnt/larder
	install -m 0644 config.json out/plugin/config.json
	install -m 0755 bin/larder-plugin out/plugin/rootfs/larder-plugin
	@if [ -e /etc/ssl/certs/ca-certificates.crt ]; then \
		install -m 0644 /etc/ssl/certs/ca-certificates.crt out/plugin/rootfs/etc/ssl/certs/; \
	fi
	@echo 'Now: docker plugin create larder:latest out/plugin && docker plugin enable --timeout 120 larder:latest'

.PHONY: clean
clean:
	rm -rf bin out
