#!/usr/bin/env bash
# Trains GLUE tasks x seeds, one run per device, resumable. Prints mean and deviation at the end.
#   bash test/train_all_tasks.sh [--sample] [--tasks=mrpc,rte] [--seeds=1-3] [--data_path=FOLDER] [--model=NAME]
#   bash test/train_all_tasks.sh --help
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

base_python
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
sweep=(-m bert_glue.sweep --output_dir "$LIB/output/all_tasks" "$@")
for word in "$@"; do # answered before the installation, which takes minutes, as are errors in the flags
  [[ $word != --help && $word != -h ]] || exec "$BASE_PYTHON" "${sweep[@]}"
done
"$BASE_PYTHON" "${sweep[@]:0:2}" --dry_run "${sweep[@]:2}" >/dev/null
npu_environment
prepare_python
preload_libgomp
exec "$PYTHON" "${sweep[@]}"
