#!/usr/bin/env bash
# Resolve pyproject.toml anew for Python 3.10 to 3.12 and write the result to constraints.txt.
# Pins that still fit are kept; usage to renew them: bash scripts/update_constraints.sh --upgrade
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$repository"
resolved="$(mktemp)"
trap 'rm -f "$resolved"' EXIT
cp scripts/constraints.txt "$resolved"
uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-header --no-annotate "$@" \
    --output-file "$resolved" pyproject.toml
{
    echo "# The versions that are tested together. Written by scripts/update_constraints.sh."
    # What [tool.uv] environments restricts the resolution to need not stand in every line.
    sed -E "s/python_full_version < '3.13' and |(platform_machine == 'x86_64'|sys_platform == 'linux'|(platform_python_implementation|implementation_name) != 'PyPy')( and )?//g
        s/ and *$//; s/ ; *$//" "$resolved"
} >scripts/constraints.txt
