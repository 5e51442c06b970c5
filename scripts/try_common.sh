# What try_kernels.sh and try_containers.sh share: a root file system with Python and this checkout. It is sourced.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${TRY_PLACES:-/var/tmp/portexec-places}
root=$work/root

say() { echo "== $*" >&2; }

need() {
    # The programs, or the Debian packages that have them.
    local missing=() program package
    while [ $# -gt 0 ]; do
        program=$1 package=$2
        shift 2
        command -v "$program" >/dev/null || missing+=("$package")
    done
    [ "${#missing[@]}" -eq 0 ] || { echo "missing: apt-get install --no-install-recommends ${missing[*]}" >&2; exit 1; }
}

make_root() {
    # A root file system, made once, with the checkout as it is now: make_root [PLACE SUITE OPTION...]. The first one is $root.
    local target=${1:-$root} suite=${2:-bookworm}
    [ $# -lt 2 ] || shift 2
    [ "$(id -u)" = 0 ] || { echo "this is for root" >&2; exit 1; }
    need debootstrap debootstrap
    mkdir -p "$work"
    if [ ! -e "$target/made" ]; then
        say "debootstrap $suite into $target"
        rm -rf "$target"
        debootstrap --variant=minbase --include=python3,iproute2,kmod "$@" "$suite" "$target" >"$work/debootstrap.log" || return 1
        (cd "$target" && rm -rf var/lib/apt/lists var/cache/apt usr/share/{doc,man,locale,info,zoneinfo} usr/lib/*/gconv)
        touch "$target/made"
    fi
    rm -rf "$target/opt/portexec"
    mkdir -p "$target/opt/portexec"
    (cd "$checkout" && tar --create --exclude __pycache__ portexec scripts tests/children tests/support/binds.py) |
        tar --extract --directory "$target/opt/portexec"
    chmod -R go+rX "$target/opt/portexec"
    chroot "$target" python3 -m compileall -q /opt/portexec/portexec
}

table() {
    # What was printed in each place, the files of $work/$1, as one table.
    local file words=()
    for file in "$work/$1"/*.txt; do words+=("$(basename "$file" .txt)=$file"); done
    python3 "$checkout/scripts/try_cases.py" --table "${words[@]}"
}
