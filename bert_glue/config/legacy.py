"""Flags of the reference and of Hugging Face 4.18 to 5.x that do not exist here, or have another meaning here.

Each row is renamed (and says how the value changes), accepted without effect, or refused with a reason.
Sources: the reference's run_glue.py, transformers' TrainingArguments of 4.18 and of each release with a
new field up to 5.23, and the argument classes of its text-classification example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bert_glue.config.values import FALSE_WORDS, NONE_WORDS, read_bool, read_number
from bert_glue.errors import did_you_mean


@dataclass(frozen=True)
class Legacy:
    """How one old flag is handled.

    Args:
        reason: one line for the user; empty if the new name says everything.
        flag: the flag that takes the value now. None: the old flag has no effect or is refused.
        value: converts the text of the old value to the text for `flag`, or to None if it requests nothing.
            Raises ValueError with the reason.
        refused: the run stops, unless the value switches the feature off.
        most_words: the largest number of values after the flag.
    """

    reason: str
    flag: str | None = None
    value: Callable[[str], str | None] = str
    refused: bool = False
    most_words: int = 1


def switches_off(text: str) -> bool:
    """Whether the value of a refused flag requests what happens here anyway."""
    return text.lower() in ("", "-1", "0.0", *FALSE_WORDS, *NONE_WORDS)


def _when_true(value: str) -> Callable[[str], str | None]:
    """Converter for an old switch that is one value of a newer flag."""
    return lambda text: value if read_bool(text) else None


def _warmup_share(text: str) -> str | None:
    share = read_number(text)
    if not 0 <= share < 1:
        raise ValueError(f"{text} is not a fraction of all steps; accepted: [0, 1)")
    return text if share else None


def _amp_backend(text: str) -> str:
    backends = {"auto": "auto", "amp": "native", "cuda_amp": "native", "cpu_amp": "native", "apex": "apex"}
    if text not in backends:
        raise ValueError(did_you_mean("value", text, list(backends)))
    return backends[text]


def _token(text: str) -> str | None:
    # In 4.x a bare --use_auth_token meant "the saved login", which is always used here.
    return None if text.lower() in ("true", *FALSE_WORDS, *NONE_WORDS) else text


_RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "data_dir": "data_path",
    "device_id": "device",
    "distributed_process_group_timeout": "ddp_timeout",
    "evaluation_strategy": "eval_strategy",
    "max_test_samples": "max_predict_samples",
    "max_val_samples": "max_eval_samples",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "label_column": "label_column_name",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "text_column": "text_column_names",
    "text_column_name": "text_column_names",
}

_CHANGED = {
    "adafactor": Legacy("", "optim", _when_true("adafactor")),
    "evaluate_during_training": Legacy("", "eval_strategy", _when_true("steps")),
    "fp16_backend": Legacy("", "amp_backend", _amp_backend),
    "group_by_length": Legacy("", "train_sampling_strategy", _when_true("group_by_length")),
    "half_precision_backend": Legacy("", "amp_backend", _amp_backend),
    "use_auth_token": Legacy("the saved login is used anyway", "token", _token),
    "warmup_ratio": Legacy("a value below 1 is a fraction of all steps", "warmup_steps", _warmup_share),
}

# Accepted without effect: reason -> flags. Nothing here may change what a run computes.
_WITHOUT_EFFECT = {
    "the output folder is never deleted, only single files are replaced": "overwrite_output_dir",
    "the environment variables RANK, LOCAL_RANK and WORLD_SIZE decide": "local_rank",
    "logs are written to --output_dir": "logging_dir",
    "a log line is printed every --logging_steps": "logging_strategy",
    "NaN and infinity are never hidden": "logging_nan_inf_filter",
    "rank 0 logs; other ranks print only warnings": "log_on_each_node log_level_replica",
    "real tokens are always counted": "include_num_input_tokens_seen include_tokens_per_second",
    "memory is always reported": "skip_memory_metrics",
    "it is only for --report_to trackio, which uses its defaults": (
        "project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "batches are assembled in this process": (
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor"
        " dataloader_multiprocessing_context dataloader_in_order dispatch_batches"
    ),
    "only the splits that a run needs are read": "remove_splits",
    "the task determines the columns": "remove_unused_columns length_column_name label_names",
    "the tokenizer's own config decides": "do_lower_case",
    "the loss is the mean over all samples of a step, for any number of ranks": "average_tokens_across_devices",
    "there is only one way to reduce gradients here": (
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph"
    ),
    "recomputation has no variants here": "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
    "this model has fused layers of its own": "use_liger_kernel liger_kernel_config",
    "encoders have no generation cache": "use_cache",
    "memory is reused between steps and not returned": "torch_empty_cache_steps",
    "evaluation is exact and runs in one pass, in the precision of training": (
        "bf16_full_eval fp16_full_eval eval_accumulation_steps eval_do_concat_batches"
        " eval_use_gather_object batch_eval_metrics"
    ),
    "metrics use predictions and labels": "include_inputs_for_metrics include_for_metrics",
    "rank 0 writes complete checkpoints as safetensors": ("save_only_model save_safetensors save_on_each_node"),
    "SIGTERM always saves a checkpoint first": "enable_jit_checkpoint",
    "resume continues exactly where the checkpoint was": ("ignore_data_skip restore_callback_states_from_checkpoint"),
    "--push_to_hub uploads once, at the end": "hub_always_push hub_strategy",
    "it is only for Ray": "ray_scope",
}

# Refused: reason -> flags. These flags would change the run, and their features are not implemented here.
_REFUSED = {
    "sharded training is not supported, because BERT fits on one device": (
        "sharded_ddp deepspeed fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap"
        " parallelism_config"
    ),
    "accelerate is set up by this program": "accelerator_config split_batches",
    "TPUs are not supported": "tpu_num_cores tpu_metrics_debug",
    "XPUs are not supported; use --ddp_backend": "xpu_backend",
    "it does not apply to BERT encoders": "past_index",
    "SageMaker model parallelism is not supported": "mp_parameters",
    "there is one training loop": "use_legacy_prediction_loop",
    "--push_to_hub uploads to the main branch": "hub_revision",
    "put the owner before the name: --hub_model_id OWNER/NAME": "push_to_hub_organization",
    "it was removed from PyTorch": "torchdynamo",
    "MPS is not supported; use --device": "use_mps_device",
    "it was removed from transformers; use --torch_compile": "use_ipex jit_mode_eval",
    "noise on embeddings is not supported": "neftune_noise_alpha",
    "the schedules of --lr_scheduler_type have no options": "lr_scheduler_kwargs",
    "optimizers are set by --adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay": "optim_args",
    "all parameters are trained": "optim_target_modules",
    "a batch size that changes by itself changes the recipe; set --per_device_train_batch_size": "auto_find_batch_size",
    "evaluation follows --eval_strategy from the start": "eval_delay",
    "run once with --do_eval alone instead": "eval_on_start",
    "evaluation always computes metrics": "prediction_loss_only",
    "every run checks for NaN and overflow": "debug",
    "some kernels have no deterministic form; --seed fixes everything else": "full_determinism",
}

_LISTS = ("label_names", "include_for_metrics")
_ANY_NUMBER = 1000


def _rows(table: dict[str, str], refused: bool) -> dict[str, Legacy]:
    # A refused flag takes all words that follow it, so that it causes only one error.
    return {
        name: Legacy(reason, refused=refused, most_words=_ANY_NUMBER if refused or name in _LISTS else 1)
        for reason, names in table.items()
        for name in names.split()
    }


LEGACY_FLAGS: dict[str, Legacy] = {
    **{old: Legacy("", new) for old, new in _RENAMED.items()},
    **_CHANGED,
    **_rows(_WITHOUT_EFFECT, refused=False),
    **_rows(_REFUSED, refused=True),
}

# Values of current flags that had another spelling: (flag, old value) -> value.
LEGACY_VALUES: dict[tuple[str, str], str] = {
    ("log_level", "passive"): "info",
    ("log_level", "detail"): "debug",
}
