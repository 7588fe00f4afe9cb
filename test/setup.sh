#!/bin/bash
# Makes a Debian machine able to run everything that "make test", "make demo"
# and "make bench" run. May be run again at any time: what is there stays.
#
#   test/setup.sh          packages, and the binaries of a current engine
#   test/setup.sh debian   packages only: what the demo needs
#
# It starts no service. Debian's packages would start dockerd and containerd as
# they are installed; a policy-rc.d that says no stands in the way meanwhile,
# and goes again at the end. systemd need not run.
#
# The current engine is built once, in some six minutes, and kept outside the
# checkout, in ${LARDER_TEST_CACHE:-/var/cache/larder-test}/engine.
set -euo pipefail

what=${1:-all}
cache=${LARDER_TEST_CACHE:-/var/cache/larder-test}
engine=$cache/engine
go=${GO:-go}

moby=github.com/moby/moby/v2/cmd/dockerd@v2.0.0-beta.24
containerd=github.com/containerd/containerd/v2/cmd
containerd_version=v2.4.2
runc=github.com/opencontainers/runc@v1.4.0

packages=(
	docker.io docker-compose runc containerd   # Debian's engine and its clients
	busybox-static                             # the image that the tests run
	xfsprogs btrfs-progs e2fsprogs quota attr  # file systems on loop devices
	util-linux mount iproute2 procps
	ca-certificates curl jq
	python3 python3-venv python3-pip           # the demo's model
)
if [ "$what" = all ]; then
	packages+=(gcc libc6-dev pkg-config libseccomp-dev) # -race, runc
	packages+=(user-mode-linux)                         # an older kernel: internal/overlay
	packages+=(chromium fonts-dejavu-core prometheus)   # the sidecar's page; metrics, alerts (promtool), dashboard
	packages+=(skopeo)                                  # reads the store as any OCI tool does
	packages+=(systemd)                                 # systemd-analyze, for the units
fi

say() { printf 'setup: %s\n' "$*" >&2; }

if [ "$(id -u)" != 0 ]; then
	say "this needs root: it installs packages; run: sudo test/setup.sh"
	exit 1
fi

guard=/usr/sbin/policy-rc.d
guarded=
remove_guard() {
	if [ -n "$guarded" ]; then
		rm -f "$guard"
	fi
}
trap remove_guard EXIT

install_packages() {
	local missing=() p
	for p in "${packages[@]}"; do
		# The docker client and its engine may be there from elsewhere
		# (docker-ce); a second one beside it would be a conflict.
		if [ "$p" = docker.io ] && command -v dockerd >/dev/null; then continue; fi
		if [ "$p" = docker-compose ] && command -v docker-compose >/dev/null; then continue; fi
		if [ "$p" = containerd ] && command -v containerd >/dev/null; then continue; fi
		if [ "$p" = runc ] && command -v runc >/dev/null; then continue; fi
		if ! dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed'; then
			missing+=("$p")
		fi
	done
	if [ ${#missing[@]} = 0 ]; then
		say "packages: all there"
		return
	fi
	if ! command -v apt-get >/dev/null; then
		say "no apt-get here; install these by hand: ${missing[*]}"
		exit 1
	fi
	say "installing: ${missing[*]}"
	if [ ! -e "$guard" ]; then
		printf '#!/bin/sh\n# Put here by test/setup.sh while it runs: packages start no service.\nexit 101\n' > "$guard"
		chmod 0755 "$guard"
		guarded=yes
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# build NAME PACKAGE: one static binary of the current engine.
build() {
	if [ -x "$engine/$1" ]; then return; fi
	say "building $1 ($2)"
	CGO_ENABLED=0 GOBIN=$engine GOFLAGS= "$go" install "$2"
}

build_engine() {
	if ! command -v "$go" >/dev/null; then
		say "no go command: install Go 1.26 first (https://go.dev/dl)"
		exit 1
	fi
	mkdir -p "$engine"
	# Outside the checkout: this module's go.mod has no say in these.
	cd "$engine"
	build dockerd "$moby"
	build containerd "$containerd/containerd@$containerd_version"
	build containerd-shim-runc-v2 "$containerd/containerd-shim-runc-v2@$containerd_version"
	build ctr "$containerd/ctr@$containerd_version"
	if [ ! -x "$engine/runc" ]; then
		say "building runc ($runc)"
		# seccomp in runc is libseccomp, so this one needs a C compiler.
		CGO_ENABLED=1 GOBIN=$engine GOFLAGS= "$go" install -tags seccomp "$runc"
	fi
	say "current engine: $engine"
}

case $what in
all)
	install_packages
	build_engine
	;;
debian)
	install_packages
	;;
*)
	say "test/setup.sh takes nothing, or the word debian"
	exit 2
	;;
esac
say "ready"
