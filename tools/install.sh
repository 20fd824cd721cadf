#!/usr/bin/env bash
# Make .venv and install llmft into it with what development needs. Usage: tools/install.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 PYTHONWARNINGS=ignore

say() { printf 'llmft: %s\n' "$*" >&2; }
stop() { say "$@"; exit 2; }

command -v "$python" >/dev/null || stop "no $python found: install Python 3.10 to 3.13, or name one with make PYTHON=/path/to/python"
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
  stop "$python is Python $version, and llmft needs 3.10 to 3.13: name another with make PYTHON=python3.12 (after removing .venv if there is one)"

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -rf .venv
  "$python" -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; stop "$python cannot make a virtual environment: install its venv module (on Debian and Ubuntu the package python3-venv)"; }
fi

say "installing into .venv with Python $(.venv/bin/python -c 'import platform; print(platform.python_version())'), a few minutes the first time"
# Big downloads and errors are shown; what pip only remarks on the way is not.
quiet='is ignored: it is neither|^INFO: |^ *(Requirement already|Looking in|Collecting|Obtaining|Processing|Using cached|Preparing|Installing build|Checking if|Getting requirements|Building|Created wheel|Stored in|Attempting uninstall|Found existing|Uninstalling|Successfully uninstalled|Successfully built)|^ *Downloading .*(metadata|kB\))|\.metadata'
.venv/bin/python -m pip install --progress-bar off -e '.[dev]' 2>&1 |
  { grep --line-buffered -vE "$quiet" || true; } |
  sed -u -e 's/^Installing collected packages:.*/unpacking the packages/' -e 's/^Successfully installed .*/installed/'

# nbdev's hooks clean notebooks on saving and merge them by cells; git finds their commands in .venv.
# Only in a repository of its own: hooks of a surrounding one, or of all repositories of a user, are left alone.
top=$(git rev-parse --show-toplevel 2>/dev/null || true)
if [ -n "$top" ] && [ "$top" -ef . ] && ! git config core.hooksPath >/dev/null; then
  .venv/bin/nbdev_install_hooks >/dev/null 2>&1 &&
    git config --local merge.nbdev-merge.driver 'PATH=".venv/bin:$PATH" nbdev_merge %O %A %B %P' &&
    printf '#!/bin/sh\nPATH=".venv/bin:$PATH" nbdev_trust\n' > "$(git rev-parse --git-path hooks)/post-merge" ||
    say 'the git hooks for notebooks could not be installed; everything else works'
fi
touch .venv/installed
