"""Every flag of `run_glue.py`: its default, unit, range and choices.

To add a flag, add one line to a group and freeze it in tests/frozen_flags.json. `parser` turns argv and config files
into `Arguments`; `checks` checks combinations of flags. Names are those of Hugging Face's TrainingArguments and
run_glue.py wherever the meaning is the same.
"""

from __future__ import annotations

import os
from dataclasses import Field, dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit


def flag(default: Any, text: str, range: str = "", choices: tuple[str, ...] = (), **extra: Any) -> Any:
    """One command-line flag.

    Args:
        default: None means "not given".
        text: help with the unit, e.g. "optimizer steps".
        range: accepted numbers, e.g. "[0, 1)" or "-1 or [1, inf)"; the help shows it unchanged.
        choices: all accepted texts.
        extra: `many=True` takes several values (of `choices`, if any), kept as one comma-separated text;
            `pattern` is a regular expression for the text; `verbatim=True` takes any text, even one that looks
            like a placeholder; `secret=True` is never printed; `runs_code=True` lets files from others run
            code, so the value is taken from the command line only, never from a file.
    """
    return field(default=default, metadata={"text": text, "range": range, "choices": choices, **extra})


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Model"""

    model_name_or_path: str | None = flag(None, "folder or hub name of the model (required unless --sample is given)")
    config_name: str | None = flag(None, "folder or hub name of the config; default: --model_name_or_path")
    tokenizer_name: str | None = flag(None, "folder or hub name of the tokenizer; default: --model_name_or_path")
    cache_dir: str | None = flag(None, "folder for downloads; default: the hub's own (HF_HOME)")
    hub: str = flag(
        "huggingface", "hub on which names of models and data sets are looked up", choices=("huggingface", "modelscope")
    )
    model_revision: str = flag("main", "branch, tag or commit of a hub model")
    use_fast_tokenizer: bool = flag(True, "transformers 5 has one tokenizer per model; False is refused")
    token: str | None = flag(None, "hub token; default: HF_TOKEN or the saved login", secret=True)
    trust_remote_code: bool = flag(False, "run Python code that comes with a hub model", runs_code=True)
    ignore_mismatched_sizes: bool = flag(False, "use new random weights if a stored shape differs")
    allow_pickle_weights: bool = flag(
        False, "read pytorch_model.bin with torch before 2.6, although it can run code", runs_code=True
    )
    hidden_dropout_prob: float | None = flag(None, "dropout probability; default: the model's", "[0, 1]")
    attention_probs_dropout_prob: float | None = flag(None, "dropout probability; default: the model's", "[0, 1]")
    freeze_encoder: bool = flag(False, "train only the head (pooler and classifier)")
    lora_rank: int | None = flag(None, "train the head and LoRA adapters of this rank (package peft)", "[1, inf)")
    lora_alpha: float | None = flag(None, "adapters are scaled by alpha / rank; default: twice the rank", "(0, inf)")
    lora_dropout: float = flag(0.0, "dropout probability before the adapters", "[0, 1)")
    lora_target_modules: str | None = flag(
        None, "names of the layers with adapters, or all-linear; default: query and value", many=True
    )


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Data"""

    task_name: str | None = flag(None, "GLUE task; its data comes from the hub unless --data_path or --sample is given")
    data_path: str | None = flag(None, "folder with train/ validation/ test/, or the original GLUE TSV folder")
    sample: bool = flag(False, "use generated sample data (not GLUE) and a tiny generated BERT")
    dataset_name: str | None = flag(None, "another data set on the hub")
    dataset_config_name: str | None = flag(None, "configuration of --dataset_name")
    train_file: str | None = flag(None, "own training data: csv, tsv, json, jsonl or parquet")
    validation_file: str | None = flag(None, "own evaluation data, in the same formats")
    test_file: str | None = flag(None, "own data to predict, in the same formats")
    text_column_names: str | None = flag(
        None, "text columns of own data: one, or two for a pair; default: chosen if there is no doubt", many=True
    )
    label_column_name: str | None = flag(
        None, "label column of own data, or several columns of 0 and 1, one a class; default: label", many=True
    )
    text_column_delimiter: str | None = flag(
        None, "joins all --text_column_names into one text; default: two columns stay a pair", verbatim=True
    )
    remove_columns: str | None = flag(None, "columns to ignore: neither text nor label", many=True)
    do_regression: bool | None = flag(None, "labels of own data are scores; default: true if one has a fraction")
    problem_type: str | None = flag(
        None,
        "kind of labels of own data; default: chosen if there is no doubt",
        choices=("single_label_classification", "multi_label_classification", "regression"),
    )
    label_delimiter: str | None = flag(None, "separates several labels in one text of own data", verbatim=True)
    label_threshold: float | None = flag(
        None, "probability above which a multi-label model gives a label; default: the model's own, else 0.5", "(0, 1)"
    )
    label_map: str | None = flag(None, "labels of own data and the classes they stand for: 0=neg,1=pos", many=True)
    drop_rows: str | None = flag(
        None, "rows of own data to leave out of training and evaluation: label=-,answer=reject; or nothing", many=True
    )
    drop_broken_rows: bool = flag(
        False, "leave out csv and tsv rows with too many or too few columns, except in test data"
    )
    validation_split_percentage: float | None = flag(
        None,
        "percentage of each class of own training data to hold out for evaluation, drawn by --data_seed",
        "(0, 100)",
    )
    shuffle_train_dataset: bool = flag(False, "draw the rows of --max_train_samples at random")
    shuffle_seed: int = flag(42, "seed of --shuffle_train_dataset", "[0, 4294967295]")
    train_split_name: str | None = flag(None, "split of --dataset_name to train on; default: train")
    validation_split_name: str | None = flag(None, "split of --dataset_name to evaluate on; default: validation")
    test_split_name: str | None = flag(None, "split of --dataset_name to predict; default: test")
    max_seq_length: int = flag(128, "tokens, including [CLS] and [SEP]; longer texts are truncated", "[3, inf)")
    doc_stride: int | None = flag(
        None, "tokens shared by the overlapping windows of a longer text; -1: truncate; default: as in training",
        "-1 or [0, inf)",
    )  # fmt: skip
    max_windows: int = flag(64, "windows of a row with --doc_stride; the text after them is not read", "[1, inf)")
    padding: str = flag(
        "auto",
        "packed: no padding; longest: pad to the longest of the batch; auto: packed if the model supports it",
        choices=("auto", "packed", "longest", "max_length"),
    )
    pad_to_max_length: bool = flag(False, "the same as --padding max_length")
    max_train_samples: int | None = flag(None, "use only this many rows, from the first on; default: all", "[1, inf)")
    max_eval_samples: int | None = flag(None, "use only this many rows of each evaluation split", "[1, inf)")
    max_predict_samples: int | None = flag(None, "use only this many rows of each test split", "[1, inf)")
    overwrite_cache: bool = flag(False, "tokenize again even if the cache is valid")
    preprocessing_num_workers: int | None = flag(None, "threads for tokenizing; default: all cores", "[1, inf)")


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """Run"""

    do_train: bool = flag(False, "fine-tune")
    do_eval: bool = flag(False, "evaluate on the validation splits")
    do_predict: bool = flag(False, "write predictions of the test splits")
    output_dir: str | None = flag(None, "folder for the model, checkpoints and results (required)")
    recipe: str | None = flag(
        None, "settings by name (reference, reference_8p, stable) or a config file; flags override them"
    )
    seed: int = flag(42, "seed of weights and dropout; without --data_seed also of the order", "[0, 4294967295]")
    data_seed: int | None = flag(None, "seed of the order of samples; default: --seed", "[0, 4294967295]")
    resume_from_checkpoint: str | None = flag(None, "checkpoint folder, or auto for the newest sound one")
    allow_changed_data: bool = flag(False, "resume although the training texts, labels or class names have changed")
    repeat: str | None = flag(None, "run.json of a finished run: repeat the run and compare the hash of the weights")
    report_to: str | None = flag(
        None,
        "trackers, several allowed; default: tensorboard if it is installed",
        choices=("none", "all", "tensorboard", "wandb", "mlflow", "swanlab", "trackio"),
        many=True,
    )
    push_to_hub: bool = flag(False, "upload the finished model and its card to the hub")
    hub_model_id: str | None = flag(None, "target repository, name or owner/name; default: the name of --output_dir")
    hub_token: str | None = flag(None, "write token; default: --token, HF_TOKEN or the saved login", secret=True)
    hub_private_repo: bool = flag(False, "make a repository that --push_to_hub creates private")
    explain: int = flag(0, "number of rows with the highest loss whose tokens the report shades; 0: off", "[0, inf)")
    run_name: str | None = flag(None, "name of the run in trackers")
    disable_tqdm: bool = flag(False, "show no progress bar")
    logging_steps: float = flag(
        500, "optimizer steps between log lines; below 1, a fraction of all steps; default: fewer in runs that would"
        " have less than 20 lines",
        "(0, 1) or [1, inf)",
    )  # fmt: skip
    logging_first_step: bool = flag(False, "also log the first step")
    log_level: str = flag("info", "lowest level shown", choices=("debug", "info", "warning", "error", "critical"))


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """Training"""

    per_device_train_batch_size: int = flag(8, "samples per device and forward pass", "[1, inf)")
    per_device_eval_batch_size: int = flag(8, "samples per device and forward pass", "[1, inf)")
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step", "[1, inf)")
    global_batch_size: int | None = flag(
        None,
        "samples per optimizer step on all ranks together; a forward pass then has at most"
        " --per_device_train_batch_size samples per device, and gradient accumulation is set to match",
        "[1, inf)",
    )
    lr_scaling: str = flag(
        "none",
        "rule that scales --learning_rate with the samples per optimizer step",
        choices=("none", "linear", "sqrt"),
    )
    lr_base_batch_size: int = flag(32, "samples per optimizer step for which --learning_rate is meant", "[1, inf)")
    learning_rate: float = flag(5e-5, "peak learning rate, per optimizer step", "[0, inf)")
    weight_decay: float = flag(0.0, "decoupled weight decay; not applied to biases and LayerNorm", "[0, inf)")
    adam_beta1: float = flag(0.9, "decay of the mean gradient", "[0, 1)")
    adam_beta2: float = flag(0.999, "decay of the mean squared gradient", "[0, 1)")
    adam_epsilon: float = flag(1e-8, "added to the denominator", "(0, inf)")
    max_grad_norm: float = flag(1.0, "L2 norm to which gradients are clipped; 0: no clipping", "[0, inf)")
    num_train_epochs: float = flag(3.0, "passes over the training data, also fractions", "(0, inf)")
    max_steps: int = flag(-1, "optimizer steps, instead of --num_train_epochs; -1: off", "-1 or [1, inf)")
    lr_scheduler_type: str = flag(
        "linear",
        "schedule of the learning rate after warm-up",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    warmup_steps: float = flag(0.0, "optimizer steps; below 1, a fraction of all steps", "[0, inf)")
    label_smoothing_factor: float = flag(0.0, "probability spread over the other classes", "[0, 1)")
    class_weights: str | None = flag(
        None, "of the classes in the loss: balanced (by their training rows), or a json file of {class: weight}"
    )
    layerwise_lr_decay: float = flag(1.0, "factor of the learning rate from each layer to the one below", "(0, 1]")
    reinit_layers: int = flag(0, "number of top layers to initialise again, with BERT's pooler", "[0, inf)")
    ema_decay: float = flag(0.0, "decay of the average of weights that is evaluated and saved; 0: off", "[0, 1)")
    rdrop_alpha: float = flag(0.0, "weight in the loss of how two dropout passes differ (R-Drop)", "[0, inf)")
    fgm_epsilon: float = flag(0.0, "L2 norm of the adversarial change to each row's word embeddings (FGM)", "[0, inf)")
    gradient_checkpointing: bool = flag(False, "recompute activations; saves memory, takes about 1.3x the time")
    optim: str = flag(
        "adamw_torch_fused",
        "optimizer; if it is not available, the nearest is used and named",
        choices=(
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_apex_fused_npu",
            "adamw_torch_npu_fused",
            "adamw_apex_fused",
            "adamw_hf",
            "adafactor",
            "lamb",
        ),
    )
    torch_compile: bool = flag(
        False, "compile the layers without their attention, before the first step; token counts are rounded up"
    )
    torch_compile_backend: str | None = flag(None, "backend; implies --torch_compile; default: inductor")
    torch_compile_mode: str | None = flag(
        None,
        "mode of backend inductor; implies --torch_compile",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    cuda_graph: bool | None = flag(
        None, "record an optimizer step per token count, then replay it; default: on CUDA, where the run allows it"
    )
    strict_optim: bool = flag(False, "stop instead of using the nearest optimizer")
    train_sampling_strategy: str = flag("random", "order of samples", choices=("random", "group_by_length"))
    dataloader_drop_last: bool = flag(False, "drop the last, incomplete training batch of an epoch")
    dataloader_num_workers: int = flag(0, "accepted without effect: batches are assembled in this process", "[0, inf)")


@dataclass(frozen=True, kw_only=True)
class EvaluationArguments:
    """Evaluation and checkpoints while training"""

    eval_strategy: str = flag("no", "when to evaluate", choices=("no", "steps", "epoch"))
    eval_steps: float | None = flag(
        None, "optimizer steps; below 1, a fraction of all steps; default: --logging_steps", "(0, 1) or [1, inf)"
    )
    save_strategy: str = flag("steps", "when to save a checkpoint", choices=("no", "steps", "epoch"))
    save_steps: float = flag(500, "optimizer steps; below 1, a fraction of all steps", "(0, 1) or [1, inf)")
    save_total_limit: int | None = flag(None, "number of checkpoints to keep; default: all", "[1, inf)")
    load_best_model_at_end: bool = flag(False, "end with the best checkpoint instead of the last one")
    metric_name: str | None = flag(
        None, "metric shown first of own data, and default of --metric_for_best_model; default: the headline metric"
    )
    metric_for_best_model: str | None = flag(None, "a metric of the task, or loss; default: the task's headline metric")
    greater_is_better: bool | None = flag(None, "whether a higher metric is better; default: true, except for loss")
    early_stopping_patience: int | None = flag(
        None, "evaluations without improvement that end training; default: off", "[1, inf)"
    )
    calibrate: bool = flag(
        False, "choose a temperature, and a threshold for two or several labels, on the validation split; kept with it"
    )
    early_stopping_threshold: float = flag(0.0, "smallest improvement that counts, in the metric's unit", "[0, inf)")
    expect: str | None = flag(
        None, "bounds such as 'mrpc.f1>=0.88', in quotes, several allowed; exit code 8 if one is missed", many=True
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionArguments:
    """Precision"""

    fp16: bool = flag(False, "train in fp16 as set by --fp16_opt_level")
    bf16: bool = flag(False, "train in bf16 as set by --fp16_opt_level; on CUDA without that flag at O2")
    fp16_opt_level: str = flag(
        "O1",
        "O0: fp32; O1: autocast; O2: low-precision model, fp32 master weights; O3: all low precision",
        choices=("O0", "O1", "O2", "O3"),
    )
    loss_scale: str | None = flag(None, "a positive number, or dynamic; default: 1024, or 1 at O3; fp16 only")
    use_combine_grad: bool = flag(False, "keep gradients in one flat buffer and clip them in one step")
    amp_backend: str = flag("auto", "implementation of mixed precision", choices=("auto", "native", "apex"))
    fallback_precision: str = flag(
        "none",
        "if the device cannot train in the chosen precision, none: stop; fp32: train in fp32 and say so",
        choices=("none", "fp32"),
    )
    tf32: bool | None = flag(
        None, "fp32 products with fewer digits: TF32 on CUDA, bf16 on a CPU; default: the device's own"
    )


@dataclass(frozen=True, kw_only=True)
class DeviceArguments:
    """Device and ranks"""

    device: str = flag("auto", "auto, an index, a name, or name:index", pattern=r"[a-z]+(:[0-9]+)?|[0-9]+")
    use_cpu: bool = flag(False, "train on the CPU even if there is another device")
    num_cpu_threads_per_process: int | None = flag(
        None, "threads of a CPU run; default: OMP_NUM_THREADS, or 1 for a small model, or all cores", "[1, inf)"
    )
    ddp_timeout: int = flag(1800, "seconds that a rank waits for the others", "[1, inf)")
    ddp_backend: str | None = flag(
        None, "communication backend; default: the device's own", choices=("hccl", "nccl", "gloo")
    )
    skip_steps: int = flag(0, "number of first optimizer steps to leave out of samples/s", "[0, inf)")
    profile_steps: str | None = flag(
        None, "first:last optimizer steps to trace, both included, counted from 1; writes trace-<rank>.json"
    )


@dataclass(frozen=True, kw_only=True)
class Arguments(
    DeviceArguments,
    PrecisionArguments,
    EvaluationArguments,
    TrainingArguments,
    RunArguments,
    DataArguments,
    ModelArguments,
):
    """All settings of one run, flat: `arguments.learning_rate`.

    Building one by hand checks nothing; `parser.parse` does. `notices` are lines for the user about flags that were
    renamed or have no effect here. `given` are the flags that the user set (None: built by hand).
    """

    notices: tuple[str, ...] = ()
    given: frozenset[str] | None = field(default=None, compare=False)

    def is_default(self, name: str) -> bool:
        """Whether a flag has its default because the user did not set it."""
        return self.given is not None and name not in self.given


@dataclass(frozen=True)
class Flag:
    """The description of one flag, from a field of `Arguments`.

    Args:
        kind: name of the type of a value: str, int, float or bool.
        optional: True if None (not given) is a value.
        group: title in the help.
        many, pattern, verbatim, secret, runs_code: see `flag`.
    """

    name: str
    kind: str
    optional: bool
    default: Any
    group: str
    text: str
    range: str = ""
    choices: tuple[str, ...] = ()
    many: bool = False
    pattern: str = ""
    verbatim: bool = False
    secret: bool = False
    runs_code: bool = False


def _flag_of(found: Field, group: str) -> Flag:
    # Annotations are texts such as "int | None" (postponed evaluation), so no typing machinery is needed.
    kind, _, none = found.type.partition(" | ")
    return Flag(found.name, kind, none == "None", found.default, group, **found.metadata)


# Reversed: dataclasses inherit fields from the last base first, and the help shows the model first.
FLAGS: dict[str, Flag] = {
    found.name: _flag_of(found, group.__doc__ or "")
    for group in reversed(Arguments.__bases__)
    for found in fields(group)
}


def without_secrets(text: str, args: Any) -> str:
    """`text` with `***` for the value of every secret flag, and for the token in HF_TOKEN.

    Args:
        args: `Arguments`, or an object with some of its fields.
    """
    secrets = [getattr(args, name, None) for name, flag in FLAGS.items() if flag.secret]
    for secret in filter(None, (*secrets, os.environ.get("HF_TOKEN"))):
        text = text.replace(secret, "***")
    return text


def without_login(address: str) -> str:
    """An address without the user and password that may stand in it."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else address


DATA_FILE_FLAGS = ("train_file", "validation_file", "test_file")
# Kinds of files that rows are read from, by the end of their names.
DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
