#!/usr/bin/env bash
# Trains bert-large-cased on one device for one epoch to measure speed, without checkpoints or evaluation.
#   bash test/train_performance_1p.sh --TASK=mrpc [--sample] [--help]
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-large-cased
HUB_NAME=google-bert/bert-large-cased
CASE=perf
EPOCHS=1
RECIPE=reference
CHANGES=(--skip_steps 5 --save_strategy no)
FLAGS=(--do_train --fallback_precision fp32)
launch "$@"
