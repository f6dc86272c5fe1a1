#!/usr/bin/env bash
# Tests the toolkit on other versions of Python, torch and transformers and writes the table in docs/stacks.md.
#   bash test/run_stacks.sh --folder=FOLDER [stack...]
#     FOLDER gets one environment a stack, 3 to 5 GB each; delete it afterwards. python3.10 to python3.13 must be
#     on the PATH. Without names: all stacks of tools/stacks.py. About 20 minutes a stack.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=test/setup_python.sh
source "$ROOT/test/setup_python.sh"

[[ ${1:-} == --folder=?* ]] || fail 2 "give --folder=FOLDER first: a folder with 25 GB free for the environments"
mkdir -p "${1#*=}"
folder=$(cd "${1#*=}" && pwd)
setup_python requirements.txt requirements/dev.txt
cd "$ROOT"
exec "$PYTHON" -m tools.stacks --folder "$folder" --only "${@:2}"
