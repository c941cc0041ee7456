#!/usr/bin/env bash
# Does the wheel hold everything? Build it, install it alone in a fresh environment, and run the tests where no source lies beside them.
#
#     scripts/wheel_test.sh [PYTEST ARGUMENTS]
#
# PYTHON names the interpreter, python3 where it is not set.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/tree"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- | tar --extract --directory="$work/tree"
"${PYTHON:-python3}" -m venv "$work/venv"
python=$work/venv/bin/python
cd "$work/tree"
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt build
"$python" -m build --outdir "$work/dist" . # the wheel is made from the source archive, so that both are tried
rm -r hagmoe_hf hagmoe_hf.egg-info
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(echo "$work"/dist/*.whl)[dev]"
"$python" -c "
import pathlib, sys, hagmoe_hf
assert pathlib.Path(hagmoe_hf.__file__).is_relative_to(sys.prefix), hagmoe_hf.__file__
print('Testing', hagmoe_hf.__file__)"
OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist loadfile -m "not slow" "$@"
