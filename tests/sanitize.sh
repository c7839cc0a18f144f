#!/usr/bin/env bash
# tests/sanitize.sh SANITIZERS RUNTIME: builds the kernel with sanitizers in a separate environment and runs its tests.
# SETS="baseline;avx2" compiles only these instruction sets, which takes less time.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-sanitize-${1//,/-}
[ -d "$venv" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -q pytest
"$venv/bin/pip" install -q --force-reinstall --no-deps -C build-dir="build/sanitize-${1//,/-}" \
    -C cmake.define.CELLSTACK_SANITIZE="$1" -C cmake.define.CELLSTACK_SETS="${SETS:-}" .
"$venv/bin/pip" install -q numpy safetensors
# Leaks aren't checked: NumPy and Python, which aren't built with the sanitizers, leak at exit.
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 TSAN_OPTIONS=halt_on_error=1 \
    PYTHONPATH=tests LD_PRELOAD="$(g++ -print-file-name="$2") $(g++ -print-file-name=libstdc++.so)" \
    "$venv/bin/python" -m pytest --noconftest -p no:cacheprovider tests/kernel/test_kernel.py tests/network/test_patches.py \
    -k "not never_comes"  # which tests timing
