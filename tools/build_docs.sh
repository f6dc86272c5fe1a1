#!/usr/bin/env bash
# Builds README and docs/ as a site with search in English and Chinese. Dead links end it with exit code 3.
#   bash tools/build_docs.sh [--folder=FOLDER]     default: build/site
# It installs requirements/docs.txt into .venv-docs once. Where that fails, it writes one plain page instead.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

folder=$ROOT/build/site
for argument in "$@"; do
  case $argument in
    --folder=?*) folder=$(realpath -m -- "${argument#*=}") ;;
    *) printf 'error: unexpected %s; --folder=FOLDER is the only flag\n' "$argument" >&2 && exit 2 ;;
  esac
done

cd "$ROOT"
venv=$ROOT/.venv-docs
if [[ ! -x $venv/bin/mkdocs || -e $venv/.installing ]]; then
  python3 -m venv --clear "$venv"
  : >"$venv/.installing"
  if "$venv/bin/python" -m pip install -qq --no-input --retries 0 --timeout 15 -r requirements/docs.txt >&2; then
    rm "$venv/.installing"
  else
    echo "note: mkdocs-material could not be installed; one plain page is written" >&2
  fi
fi
[[ ! -e $venv/.installing ]] || exec python3 -m tools.build_docs --plain --folder "$folder"

pages=$ROOT/build/pages
python3 -m tools.build_docs --folder "$pages"
log=$ROOT/build/mkdocs.log
# Material's notice about its successor and jieba's lines are no part of the build.
if ! NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --quiet --strict --config-file "$pages/mkdocs.yml" \
  --site-dir "$folder" 2>"$log"; then
  cat "$log" >&2
  exit 1
fi
echo "wrote $folder/index.html"
