# Sourced by demo.sh and test.sh: makes <repository>/.venv with the tested versions (constraints.txt) and puts its
# commands first on PATH. What is there is used again until pyproject.toml, constraints.txt, this file or the place of
# the checkout changes.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="$repository/.venv"

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        # Run it: a version manager's shim can be on PATH without an interpreter behind it.
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Error: no Python 3.10, 3.11 or 3.12 with its venv module was found on PATH. Install one (Debian and Ubuntu:" \
        "apt-get install python3 python3-venv) and run this script again." >&2
    return 1
}

environment_fingerprint() {
    {
        echo "$repository"
        cat "$repository/pyproject.toml" "$repository/scripts/constraints.txt" "$repository/scripts/env.sh"
    } | { sha256sum 2>/dev/null || shasum -a 256; }
}

make_environment() {
    local python constraints="$repository/scripts/constraints.txt"
    python="$(find_python)" || return
    echo "Installing into $environment ($("$python" --version)); this takes a few minutes and 9 GB."
    rm -rf "$environment" || return
    "$python" -m venv "$environment" || return
    local in_environment="$environment/bin/python"
    "$in_environment" -m pip install --quiet --constraint "$constraints" uv || return
    # Bytecode now: each of nerfstudio's commands would else compile for many seconds where Python may not write it.
    # pip is slower, and knows registries that are configured for pip alone.
    "$in_environment" -m uv pip install --quiet --compile-bytecode --python "$in_environment" \
        --constraint "$constraints" --editable "$repository[dev]" ||
        {
            echo "uv could not install; trying pip, which takes some minutes longer."
            "$in_environment" -m pip install --quiet --constraint "$constraints" --editable "$repository[dev]"
        } || return
    # Last: an installation that was interrupted has no stamp and is made anew.
    environment_fingerprint >"$environment/stamp"
}

unset PYTHONPATH PYTHONHOME
if [ "$(cat "$environment/stamp" 2>/dev/null)" != "$(environment_fingerprint)" ]; then
    make_environment || exit 1
fi
export VIRTUAL_ENV="$environment" PATH="$environment/bin:$PATH"
