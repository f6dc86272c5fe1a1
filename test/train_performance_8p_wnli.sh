#!/usr/bin/env bash
# Measures the speed of bert-large-cased on eight devices for WNLI. 635 rows give two steps per epoch, so it runs 80 epochs.
#   bash test/train_performance_8p_wnli.sh [--nproc=8] [--baseline=perf.json] [--sample] [--help]
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-large-cased
HUB_NAME=google-bert/bert-large-cased
CASE=perf
EPOCHS=80
RANKS=8
TASK=wnli
RECIPE=reference_8p
CHANGES=(--save_strategy no)
FLAGS=(--do_train --fallback_precision fp32)
launch "$@"
