#!/usr/bin/env bash
# Boots Debian's kernels in qemu, and runs scripts/try_cases.py in each: as root, as an ordinary user, and with Yama 2 and 3.
#
#     try_kernels.sh [SUITE]...      default: bullseye bookworm trixie sid, which have 5.10, 6.1, 6.12 and a new one
#
# Needs root, qemu-system-x86, debootstrap and cpio. A kernel is emulated, unless TRY_KVM is set, and takes its time: some ten
# minutes for each column. TRY_COLUMNS chooses among root, user, yama2 and yama3, TRY_ONLY the cases that have a word in their
# names. What is made stays in $TRY_PLACES, by default /var/tmp/portexec-places; a suite whose archive cannot be had is said and
# left out. Not part of continuous integration.
#
# TRY_TESTS has words for pytest, as "tests/test_guard.py tests/test_theft.py": these tests are run in each column, instead of the
# cases, and pytest's own output is printed. Their root file system has a virtual environment, gcc and strace, and is another one.
# Emulated, a test takes ten to thirty times as long: TRY_SLOW, by default 20, is how much longer the tests wait, and TRY_EXAMPLES
# how many examples the state machine of the guard tries. TRY_CPUS is the number of processors, by default 2.
# A gate closes when its caller has computed for a millisecond, which may be before the call is made there. So one test of gates
# in five fails with EADDRINUSE, or as the rehearsal does, and says nothing of the kernel.
set -euo pipefail
. "$(dirname "$0")/try_common.sh"

columns=${TRY_COLUMNS:-root user yama2 yama3}
tests=${TRY_TESTS:-}
slow=${TRY_SLOW:-20}
results=$work/kernels
[ -z "$tests" ] || results=$work/kernels-tests
suites=("$@")
[ $# -gt 0 ] || suites=(bullseye bookworm trixie sid)

download_kernel() {
    # The newest kernel image of a suite, unpacked in $work/kernel-SUITE; by apt, with lists of its own.
    local suite=$1 apt=$work/apt-$1 target=$work/kernel-$1 image package
    [ ! -e "$target/made" ] || return 0
    rm -rf "$apt" "$target"
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$target"
    # From the mirrors that this machine has for its own suite.
    local keys=/usr/share/keyrings/debian-archive-keyring.gpg mirror distribution
    while read -r mirror distribution; do
        case $distribution in
            *-updates | *-backports) ;;
            *-security) [ "$suite" = sid ] || echo "deb [signed-by=$keys] $mirror $suite-security main" ;;
            *) echo "deb [signed-by=$keys] $mirror $suite main" ;;
        esac
    done < <(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | sort -u) >"$apt/sources.list"
    local options=(-q -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$apt/lists"
        -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
    depends() { apt-cache "${options[@]}" depends "$1" 2>>"$apt/log" | sed -n "s/^ *Depends: \($2.*\)/\1/p"; }
    apt-get "${options[@]}" update >"$apt/log" 2>&1 || true
    image=$(depends linux-image-cloud-amd64 'linux-image-[0-9]')
    [ -n "$image" ] || return 1
    # Newer ones are in several packages.
    (cd "$apt" && apt-get "${options[@]}" download $image $(depends "$image" 'linux-\(binary\|modules\)-[0-9]') >>log 2>&1) || return 1
    for package in "$apt"/*.deb; do dpkg-deb --extract "$package" "$target"; done
    [ -d "$target/lib/modules" ] || ln -s usr/lib "$target/lib" # where the directories are merged
    touch "$target/made"
}

make_test_root() {
    # A root file system that has what the tests need, with the whole checkout.
    local tools=gcc,gcc-multilib,libc6-dev,libc6-dev-i386,strace,curl,make,git,util-linux,procps,libsystemd0
    root=$work/root-tests
    make_root "$root" bookworm --include="python3,iproute2,kmod,python3-venv,ca-certificates,$tools"
    (cd "$checkout" && tar --create --exclude __pycache__ --exclude .git --exclude '.venv*' .) |
        tar --extract --directory "$root/opt/portexec"
    chmod -R go+rX "$root/opt/portexec"
    if [ ! -e "$root/opt/venv/made" ]; then
        say "a virtual environment in $root"
        rm -rf "$root/opt/venv"
        cp /etc/resolv.conf "$root/etc/resolv.conf"
        [ -z "${PIP_CERT:-}" ] || cp --dereference "$PIP_CERT" "$root/etc/ssl/certs/ca-certificates.crt"
        chroot "$root" python3 -m venv /opt/venv
        chroot "$root" sh -c 'unset PIP_CERT PIP_FIND_LINKS && cd /opt/portexec && pip="/opt/venv/bin/pip --quiet --no-cache-dir" &&
            $pip install --upgrade pip && $pip install --editable . --group test && rm -f /opt/venv/bin/uv*' >"$work/pip.log" 2>&1
        touch "$root/opt/venv/made"
    fi
    # What is compiled here takes no time in the guest. pytest compiles its test modules in a way of its own.
    chroot "$root" /opt/venv/bin/python -m compileall -q /opt/portexec/tests || true # one has a mistake on purpose
    chroot "$root" sh -c "cd /opt/portexec && /opt/venv/bin/python -m pytest --collect-only -q $tests" >"$work/collected" </dev/null
    grep -q ^tester: "$root/etc/passwd" || echo tester:x:1000:1000::/tmp:/bin/sh >>"$root/etc/passwd"
}

write_init() {
    # The first program: mounts, and a run of the cases, or of the tests, for each column, with lines around it by which it is
    # found again.
    local command
    command="python3 /opt/portexec/scripts/try_cases.py --only \"${TRY_ONLY:-}\" --as \"\$2\""
    [ -z "$tests" ] || command="try_tests \"\$2\""
    cat >"$1" <<INIT
#!/bin/sh
export PATH=/usr/sbin:/usr/bin TRY_DEADLINE=240
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o mode=1777 tmp /tmp
ip link set lo up
run() { echo; echo "@@ begin \$1"; $command 2>&1; echo "@@ end"; }
try_tests() (
    # As in a session of a distribution: terminals, a home, and more descriptors for who asks.
    mkdir -p /dev/pts /dev/shm /tmp/as-\$1
    mountpoint -q /dev/pts || mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
    mountpoint -q /dev/shm || mount -t tmpfs -o mode=1777 shm /dev/shm
    ulimit -Hn 524288
    chown "\$1" /tmp/as-\$1
    export HOME=/tmp/as-\$1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/as-\$1/hypothesis LANG=C.UTF-8
    export PORTEXEC_SLOW=$slow PORTEXEC_EXAMPLES=${TRY_EXAMPLES:-}
    cd /opt/portexec
    exec setpriv --reuid "\$1" --regid "\$1" --clear-groups -- /opt/venv/bin/python -m pytest --color no -q -p no:cacheprovider \\
        --timeout $((slow * 240)) $tests </dev/null
)
for column in $columns; do
    case \$column in
        root) run root 0 ;;
        user) run user 1000 ;;
        yama*) echo "\${column#yama}" >/proc/sys/kernel/yama/ptrace_scope && run \$column 1000 ;;
    esac
done
python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x4321FEDC)'
INIT
    chmod 755 "$1"
}

make_initramfs() {
    # The root file system, the kernel's modules that tell of sockets, which sock_diag(7) has loaded, or are a network device, and
    # the first program.
    local modules=$1/lib/modules version=$2 file=$3 first=$work/first-$2
    mkdir -p "$root/lib/modules/$version" "$first"
    (
        cd "$modules/$version"
        find . \( -name '*_diag.ko*' -o -name 'veth.ko*' -o -name 'dummy.ko*' -o -name 'modules.builtin*' -o -name modules.order \) \
            -print0 |
            cpio --quiet --null --pass-through --make-directories --unconditional "$root/lib/modules/$version"
    )
    chroot "$root" depmod "$version"
    write_init "$first/init"
    (cd "$root" && find . -xdev -path ./var/lib/dpkg -prune -o -print | cpio --quiet --create --format newc) >"$file"
    (cd "$first" && find . | cpio --quiet --create --format newc) >>"$file"
}

boot() {
    # Boot one kernel, and cut what it printed into a file for each column.
    local suite=$1 target=$work/kernel-$1 version kernel log=$work/boot-$1.log accelerator=tcg,thread=multi cpu=max memory=2048
    version=$(basename "$target"/lib/modules/*)
    kernel=$target/boot/vmlinuz-$version
    [ -e "$kernel" ] || kernel=$target/lib/modules/$version/vmlinuz # where newer packages have it
    [ -z "${TRY_KVM:-}" ] || { accelerator=kvm cpu=host; }
    [ -z "$tests" ] || memory=4096
    make_initramfs "$target" "$version" "$work/initramfs-$suite"
    say "$suite: Linux $version, $columns"
    timeout "${TRY_TIMEOUT:-7200}" qemu-system-x86_64 -accel "$accelerator" -cpu "$cpu" -smp "${TRY_CPUS:-2}" -m "$memory" \
        -nic none -nographic -no-reboot \
        -kernel "$kernel" -initrd "$work/initramfs-$suite" \
        -append "console=ttyS0 panic=-1 loglevel=0 tsc=reliable" </dev/null >"$log" 2>&1 || say "$suite: qemu ended with $?"
    tr -d '\r' <"$log" | awk -v place="$results/$(echo "$version" | cut -d. -f1-2)" '
        /^@@ begin/ { file = place "-" $3 ".txt"; printf "" >file; next }
        /^@@ end/ { file = "" }
        file != "" { print >file }'
    rm -f "$work/initramfs-$suite"
}

need qemu-system-x86_64 qemu-system-x86 cpio cpio
if [ -n "$tests" ]; then make_test_root; else make_root; fi
mkdir -p "$results"
for suite in "${suites[@]}"; do
    if download_kernel "$suite"; then boot "$suite"; else say "$suite: its kernel cannot be had here"; fi
done
if [ -n "$tests" ]; then tail -n 1 "$results"/*.txt; else table kernels; fi
