#!/usr/bin/env bash
# Fine-tunes bert-large-cased on one device and evaluates it: the published recipe of one task.
#   bash test/train_full_1p.sh --TASK=mrpc [--sample] [--help]
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-large-cased
HUB_NAME=google-bert/bert-large-cased
CASE=acc
EPOCHS=""
RECIPE=(
  --do_train --do_eval --max_seq_length 128 --dataloader_drop_last
  --fp16 --fp16_opt_level O2 --loss_scale 1024.0 --fallback_precision fp32
  --optim adamw_apex_fused_npu --use_combine_grad --skip_steps 5
  --save_strategy epoch --save_total_limit 1
)
launch "$@"
