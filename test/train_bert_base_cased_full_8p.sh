#!/usr/bin/env bash
# Fine-tunes bert-base-cased on eight devices of one host and evaluates it, with the epochs of Hugging Face's README.
#   bash test/train_bert_base_cased_full_8p.sh --TASK=mrpc [--nproc=8] [--sample] [--help]
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-base-cased
HUB_NAME=google-bert/bert-base-cased
CASE=acc
RANKS=8
EPOCHS=base
RECIPE=reference_8p
CHANGES=(--fp16_opt_level O1)
FLAGS=(--do_train --do_eval --fallback_precision fp32)
launch "$@"
