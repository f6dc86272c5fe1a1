#!/usr/bin/env bash
# Fine-tunes bert-large-cased on the devices of several hosts. Run it once on each host, with a shared --output_dir:
#   bash test/train_multinode.sh --TASK=mrpc --nnodes=2 --node_rank=0 --master_addr=HOST --output_dir=SHARED [--help]
# A launch resumes from the newest sound checkpoint in --output_dir.
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-large-cased
HUB_NAME=google-bert/bert-large-cased
CASE=acc
RANKS=8
HOSTS=yes
RECIPE=reference_8p
CHANGES=(--save_strategy epoch --save_total_limit 2)
FLAGS=(--do_train --do_eval --fallback_precision fp32 --resume_from_checkpoint auto)
launch "$@"
