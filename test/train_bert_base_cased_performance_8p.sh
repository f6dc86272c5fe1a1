#!/usr/bin/env bash
# Trains bert-base-cased on eight devices of one host for one epoch, for its speed: no checkpoints, no evaluation.
#   bash test/train_bert_base_cased_performance_8p.sh --TASK=mrpc [--nproc=8] [--baseline=perf.json] [--sample]
set -euo pipefail
# shellcheck source=test/launch_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_lib.sh"

NETWORK=bert-base-cased
HUB_NAME=google-bert/bert-base-cased
CASE=perf
EPOCHS=1
RANKS=8
RECIPE=(
  --do_train --max_seq_length 128 --dataloader_drop_last
  --fp16 --fp16_opt_level O1 --loss_scale 1024.0 --fallback_precision fp32
  --optim adamw_apex_fused_npu --use_combine_grad --skip_steps 5
  --save_strategy no
)
launch "$@"
