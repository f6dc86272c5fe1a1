#!/usr/bin/env bash
# Fine-tunes bert-large-cased on eight devices of one host and evaluates it, with the published recipe of a task.
#   bash test/train_full_8p.sh --TASK=mrpc [--nproc=8] [--sample] [--help]
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-large-cased
HUB_NAME=google-bert/bert-large-cased
CASE=acc
RANKS=8
RECIPE=reference_8p
FLAGS=(--do_train --do_eval --fallback_precision fp32)
launch "$@"
