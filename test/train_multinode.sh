#!/usr/bin/env bash
# Fine-tunes bert-large-cased on the devices of several hosts. Once on each host, with a shared --output_dir:
#   bash test/train_multinode.sh --TASK=mrpc --nnodes=2 --node_rank=0 --master_addr=HOST --output_dir=SHARED [--help]
# A launch goes on from the newest sound checkpoint in --output_dir.
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-large-cased
HUB_NAME=google-bert/bert-large-cased
CASE=acc
EPOCHS=""
RANKS=8
HOSTS=yes
PUBLISHED=8p
RECIPE=(
  --do_train --do_eval --max_seq_length 128 --dataloader_drop_last
  --fp16 --fp16_opt_level O2 --loss_scale 1024.0 --fallback_precision fp32
  --optim adamw_apex_fused_npu --use_combine_grad --skip_steps 5
  --save_strategy epoch --save_total_limit 2 --resume_from_checkpoint auto
)
launch "$@"
