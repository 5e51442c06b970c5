#!/usr/bin/env bash
# Runs scripts/try_cases.py in containers and sandboxes: Docker, Podman, systemd-nspawn, bubblewrap, gVisor, and where a process
# finds less than elsewhere: another PID namespace's /proc, no /proc, an emulated processor, PyPy.
#
#     try_containers.sh [PLACE]...      default: all of them, as below in `places`
#
# Needs root, debootstrap, and for each place the Debian package: docker.io, podman with crun, systemd-container, bubblewrap,
# runsc, qemu-user-static, pypy3 (installed into the root file system). A place that cannot be had is said and left out. Docker
# runs in a daemon of our own, without networks, that ends with this. What is made stays in $TRY_PLACES, by default
# /var/tmp/portexec-places. TRY_PODMAN is the runtime of Podman, by default crun. TRY_ONLY chooses the cases that have a word in
# their names. Not part of continuous integration.
set -euo pipefail
. "$(dirname "$0")/try_common.sh"

places=(docker docker-user docker-unconfined podman nspawn bwrap bwrap-user gvisor outer-proc no-proc qemu-user pypy)
[ $# -eq 0 ] || places=("$@")
image=portexec-places
cases=(/opt/portexec/scripts/try_cases.py --only "${TRY_ONLY:-}")
export TRY_DEADLINE=${TRY_DEADLINE:-120}

pack() { tar --create --directory "$root" --exclude ./var/lib/dpkg .; }

ours() { # a command with Docker's client, of a daemon of our own
    docker --host "unix://$work/docker.sock" "$@"
}

start_docker() {
    ! ours info >/dev/null 2>&1 || return 0
    command -v dockerd >/dev/null || return 1
    dockerd --host "unix://$work/docker.sock" --data-root "$work/docker" --exec-root "$work/docker-run" \
        --pidfile "$work/docker.pid" --iptables=false --bridge=none >"$work/docker.log" 2>&1 &
    trap 'kill "$(cat "$work/docker.pid")" 2>/dev/null || true' EXIT
    local tries
    for tries in $(seq 100); do
        ours info >/dev/null 2>&1 && { pack | ours import - "$image" >/dev/null; return 0; }
        sleep 0.2
    done
    return 1
}

in_docker() { start_docker && ours run --rm --network none --env TRY_DEADLINE "$@" "$image" python3 "${cases[@]}"; }

in_podman() {
    command -v podman >/dev/null || return 1
    local ours=(podman --root "$work/podman" --runroot "$work/podman-run" --cgroup-manager cgroupfs --runtime "${TRY_PODMAN:-crun}")
    pack | "${ours[@]}" import --quiet - "$image" >/dev/null &&
        "${ours[@]}" run --rm --network none --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --env TRY_DEADLINE "$image" python3 "${cases[@]}"
}

in_nspawn() {
    systemd-nspawn --quiet --register=no --keep-unit --directory "$root" --volatile=overlay --private-network --pipe \
        --setenv "TRY_DEADLINE=$TRY_DEADLINE" python3 "${cases[@]}"
}

in_bwrap() {
    "$@" bwrap --ro-bind "$root" / --dev /dev --proc /proc --tmpfs /tmp --unshare-all python3 "${cases[@]}"
}

in_gvisor() {
    runsc --ignore-cgroups --network=none --platform="${TRY_GVISOR:-ptrace}" do -root "$root" \
        env "TRY_DEADLINE=$TRY_DEADLINE" python3 "${cases[@]}"
}

in_namespaces() {
    # Below another root, in namespaces of its own: its own /proc, the outer one, or none.
    local proc=$1 below=$2
    shift 2
    unshare --mount --net --pid --fork sh -c '
        ip link set lo up
        case $1 in
            own) mount -t proc proc "$2/proc" ;;
            outer) mount --bind /proc "$2/proc" ;;
        esac
        mount --rbind /dev "$2/dev"
        below=$2
        shift 2
        exec chroot "$below" env PATH=/usr/sbin:/usr/bin "$@"' sh "$proc" "$below" "TRY_DEADLINE=$TRY_DEADLINE" "$@" "${cases[@]}"
}

with_qemu() {
    # The kernel has to know what to start an ARM program with: the package's service does that, or see binfmt_misc.
    [ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || return 1
    make_root "$root-arm64" bookworm --arch=arm64 && TRY_DEADLINE=300 in_namespaces own "$root-arm64" python3
}

with_pypy() { make_root "$root-pypy" trixie --include=python3,iproute2,kmod,pypy3 && in_namespaces own "$root-pypy" pypy3; }

try() {
    case $1 in
        docker) in_docker ;;
        docker-user) in_docker --user 1000 ;;
        docker-unconfined) in_docker --security-opt seccomp=unconfined ;;
        podman) in_podman ;;
        nspawn) in_nspawn ;;
        bwrap) in_bwrap env ;;
        bwrap-user) in_bwrap setpriv --reuid 1000 --regid 1000 --clear-groups ;;
        gvisor) in_gvisor ;;
        outer-proc) in_namespaces outer "$root" python3 ;;
        no-proc) in_namespaces none "$root" python3 ;;
        qemu-user) with_qemu ;;
        pypy) with_pypy ;;
        *) echo "there is no place $1" >&2; exit 1 ;;
    esac
}

make_root
mkdir -p "$work/containers"
for place in "${places[@]}"; do
    say "$place"
    try "$place" >"$work/containers/$place.txt" 2>"$work/containers/$place.log" </dev/null || true # 1 where a case is a NO
    if [ ! -s "$work/containers/$place.txt" ]; then
        say "$place cannot be had here: $(tail -n 1 "$work/containers/$place.log")"
        rm "$work/containers/$place.txt"
    fi
done
table containers
