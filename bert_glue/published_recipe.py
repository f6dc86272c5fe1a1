"""The published one-device recipe as test/train_full_1p.sh passes it, for what runs or examines it without a shell."""

from __future__ import annotations

# Flag -> its text. Learning rate and epochs are apart: generated sample data has its own.
PUBLISHED_RECIPE = {
    "do_train": "true",
    "do_eval": "true",
    "max_seq_length": "128",
    "dataloader_drop_last": "true",
    "per_device_train_batch_size": "32",
    "per_device_eval_batch_size": "32",
    "fp16": "true",
    "fp16_opt_level": "O2",
    "loss_scale": "1024.0",
    "fallback_precision": "fp32",
    "optim": "adamw_apex_fused_npu",
    "use_combine_grad": "true",
    "skip_steps": "5",
    "save_strategy": "epoch",
    "save_total_limit": "1",
}
PUBLISHED_LEARNING_RATE = "2e-5"
