#!/usr/bin/env bash
# Fine-tunes bert-large-cased on one device and evaluates it, with the published recipe of a task.
#   bash test/train_full_1p.sh --TASK=mrpc [--sample] [--help]
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-large-cased
HUB_NAME=google-bert/bert-large-cased
CASE=acc
RECIPE=reference
CHANGES=(--save_strategy epoch --save_total_limit 1)
FLAGS=(--do_train --do_eval --fallback_precision fp32 --skip_steps 5)
launch "$@"
