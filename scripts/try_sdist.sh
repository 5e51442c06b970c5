#!/usr/bin/env bash
# Unpacks the sdist in dist/, and tries in it what is in it: every test module can be imported, and the quick ones pass. Run by
# `make package`.
#
#     try_sdist.sh PYTHON      with pytest installed
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath --no-symlinks "$1")
quick=(tests/test_options.py tests/test_spec.py tests/test_templates.py tests/test_share.py tests/test_stable.py)

place=$(mktemp --directory)
trap 'rm -rf "$place"' EXIT
tar --extract --file dist/portexec-*.tar.gz --directory "$place" --strip-components 1
cd "$place"

echo "== the tests of the sdist"
"$python" -m pytest -q -p no:cacheprovider --collect-only >collected || { tail -n 40 collected; exit 1; }
tail -n 1 collected
PYTHONPATH="$place" "$python" -m pytest -q -p no:cacheprovider "${quick[@]}" # the `portexec` that is started is the one there
