#!/usr/bin/env bash
# Lint, format, types and the whole test suite, in an environment that is made when it is not there.
# Usage: bash scripts/test.sh [arguments for pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$repository"

failed=()
check() {
    echo "== $*"
    "$@" || failed+=("$1 ${2:-}")
}

check ruff check .
check ruff format --check .
check mypy
for name in "${failed[@]}"; do echo "FAILED: $name (the tests run all the same)"; done

# The tests come last, so that their summary ends the output.
echo "== pytest"
# One thread of PyTorch each: several processes share the processors.
OMP_NUM_THREADS=1 pytest --numprocesses logical --maxprocesses 4 --dist loadfile "$@" || exit
[ ${#failed[@]} -eq 0 ]
