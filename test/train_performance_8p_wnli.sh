#!/usr/bin/env bash
# Speed of bert-large-cased on eight devices for WNLI: 635 rows are two steps an epoch, so 80 epochs are run.
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
RECIPE=(
  --do_train --max_seq_length 128 --dataloader_drop_last
  --fp16 --fp16_opt_level O2 --loss_scale 1024.0 --fallback_precision fp32
  --optim adamw_apex_fused_npu --use_combine_grad --skip_steps 5
  --save_strategy no
)
launch "$@"
