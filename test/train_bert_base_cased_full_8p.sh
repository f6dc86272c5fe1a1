#!/usr/bin/env bash
# Fine-tunes bert-base-cased on eight devices of one host and evaluates it; epochs of Hugging Face's README.
#   bash test/train_bert_base_cased_full_8p.sh --TASK=mrpc [--nproc=8] [--sample] [--help]
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-base-cased
HUB_NAME=google-bert/bert-base-cased
CASE=acc
EPOCHS=""
RANKS=8
PUBLISHED=base
RECIPE=(
  --do_train --do_eval --max_seq_length 128 --dataloader_drop_last
  --fp16 --fp16_opt_level O1 --loss_scale 1024.0 --fallback_precision fp32
  --optim adamw_apex_fused_npu --use_combine_grad --skip_steps 5
  --save_strategy steps --save_steps 50000
)
launch "$@"
