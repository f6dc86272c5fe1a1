#!/usr/bin/env bash
# Trains bert-large-cased on eight devices of one host for one epoch to measure speed, without checkpoints or evaluation.
#   bash test/train_performance_8p.sh --TASK=mrpc [--nproc=8] [--baseline=perf.json] [--sample] [--help]
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-large-cased
HUB_NAME=google-bert/bert-large-cased
CASE=perf
EPOCHS=1
RANKS=8
RECIPE=reference_8p
CHANGES=(--save_strategy no)
FLAGS=(--do_train --fallback_precision fp32)
launch "$@"
