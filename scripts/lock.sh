#!/usr/bin/env bash
# Writes requirements.txt and requirements-dev.txt from pyproject.toml: exact versions with hashes, for every system
# the project names. `make lock` runs it; `make lock UPGRADE=1` also takes newer releases.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=${UV:-uv}
options=(--quiet --universal --python-version 3.11 --generate-hashes --no-header
    --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock")
if [[ -n ${UPGRADE:-} ]]; then options+=(--upgrade); fi

"$uv" pip compile pyproject.toml "${options[@]}" --output-file requirements.txt
"$uv" pip compile pyproject.toml --group dev --constraints requirements.txt "${options[@]}" --output-file requirements-dev.txt
