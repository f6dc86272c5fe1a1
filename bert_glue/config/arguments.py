"""Every flag of `run_glue.py`: its default, unit, range and choices.

To add a flag, add one line to a group and freeze it in tests/frozen_flags.json. `command_line` turns
argv and config files into `Arguments`; `argument_checks` holds what one flag alone cannot know. Names
are those of Hugging Face's TrainingArguments and run_glue.py wherever the meaning is the same.
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
        range: accepted numbers, e.g. "[0, 1)" or "-1 or [1, inf)"; shown in the help as it stands.
        choices: accepted texts, all of them.
        extra: `many=True` takes several values (of `choices`, if any), kept as one comma-separated text;
            `pattern` is a regular expression for the text; `verbatim=True` takes any text, a placeholder's
            look included; `secret=True` is never printed; `runs_code=True` lets
            files of others run code, so it is taken from the command line alone, never from a file.
    """
    return field(default=default, metadata={"text": text, "range": range, "choices": choices, **extra})


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Model"""

    model_name_or_path: str | None = flag(None, "folder or hub name of the model (required, but for --sample)")
    config_name: str | None = flag(None, "config of another model than --model_name_or_path")
    tokenizer_name: str | None = flag(None, "tokenizer of another model than --model_name_or_path")
    cache_dir: str | None = flag(None, "folder for downloads; default: that of the hub (HF_HOME)")
    hub: str = flag(
        "huggingface", "where names of models and data sets are looked up", choices=("huggingface", "modelscope")
    )
    model_revision: str = flag("main", "branch, tag or commit of a hub model")
    use_fast_tokenizer: bool = flag(True, "the only tokenizer that transformers 5 has; False is refused")
    token: str | None = flag(None, "hub token; default: HF_TOKEN or the saved login", secret=True)
    trust_remote_code: bool = flag(False, "run Python code that comes with a hub model", runs_code=True)
    ignore_mismatched_sizes: bool = flag(False, "new random weights where a stored shape differs")
    allow_pickle_weights: bool = flag(
        False, "read pytorch_model.bin with a torch before 2.6, though it can run code", runs_code=True
    )
    hidden_dropout_prob: float | None = flag(None, "probability; default: the model's", "[0, 1]")
    attention_probs_dropout_prob: float | None = flag(None, "probability; default: the model's", "[0, 1]")
    freeze_encoder: bool = flag(False, "train the head alone (pooler and classifier)")
    lora_rank: int | None = flag(None, "train the head and adapters of this rank (LoRA, package peft)", "[1, inf)")
    lora_alpha: float | None = flag(None, "adapters count alpha / rank times; default: twice the rank", "(0, inf)")
    lora_dropout: float = flag(0.0, "probability, before the adapters", "[0, 1)")
    lora_target_modules: str | None = flag(
        None, "names of adapted layers, or all-linear; default: query and value", many=True
    )


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Data"""

    task_name: str | None = flag(None, "GLUE task; its data comes from the hub unless one of the next is given")
    data_path: str | None = flag(None, "folder with train/ validation/ test/, or the original GLUE TSV folder")
    sample: bool = flag(False, "generated sample data (not GLUE) and a tiny BERT made on the spot")
    dataset_name: str | None = flag(None, "another data set of the hub")
    dataset_config_name: str | None = flag(None, "configuration of --dataset_name")
    train_file: str | None = flag(None, "own training data: csv, tsv, json, jsonl or parquet")
    validation_file: str | None = flag(None, "own evaluation data, same formats")
    test_file: str | None = flag(None, "own data to predict, same formats")
    text_column_names: str | None = flag(
        None, "columns with the texts of own data: one, or two for a pair; default: where it is certain", many=True
    )
    label_column_name: str | None = flag(None, "column with the labels of own data; default: label")
    text_column_delimiter: str | None = flag(
        None, "joins all --text_column_names into one text; default: a pair stays", verbatim=True
    )
    remove_columns: str | None = flag(None, "columns that are neither text nor label", many=True)
    do_regression: bool | None = flag(None, "labels of own data are scores; default: if one has a fraction")
    label_map: str | None = flag(None, "labels of own data and the classes they stand for: 0=neg,1=pos", many=True)
    drop_rows: str | None = flag(
        None, "rows of own data to leave out of training and evaluation: label=-,answer=reject; or nothing", many=True
    )
    drop_broken_rows: bool = flag(
        False, "leave out rows of csv and tsv with too many or too few columns; never of test data"
    )
    validation_split_percentage: float | None = flag(
        None, "share of own training data held out for evaluation, of each class, by the seed of the order", "(0, 100)"
    )
    shuffle_train_dataset: bool = flag(False, "draw the rows of --max_train_samples at random")
    shuffle_seed: int = flag(42, "of --shuffle_train_dataset", "[0, 4294967295]")
    train_split_name: str | None = flag(None, "split of --dataset_name to train on; default: train")
    validation_split_name: str | None = flag(None, "split of --dataset_name to evaluate on; default: validation")
    test_split_name: str | None = flag(None, "split of --dataset_name to predict; default: test")
    max_seq_length: int = flag(128, "tokens, with [CLS] and [SEP]; longer texts are cut", "[3, inf)")
    padding: str = flag(
        "auto",
        "packed: none at all; longest: to the batch's longest; auto: packed where the model can",
        choices=("auto", "packed", "longest", "max_length"),
    )
    pad_to_max_length: bool = flag(False, "the same as --padding max_length")
    max_train_samples: int | None = flag(None, "first rows only; default: all", "[1, inf)")
    max_eval_samples: int | None = flag(None, "first rows only, of each evaluation split", "[1, inf)")
    max_predict_samples: int | None = flag(None, "first rows only, of each test split", "[1, inf)")
    overwrite_cache: bool = flag(False, "tokenize again although the cache fits")
    preprocessing_num_workers: int | None = flag(None, "threads for tokenizing; default: all cores", "[1, inf)")


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """Run"""

    do_train: bool = flag(False, "fine-tune")
    do_eval: bool = flag(False, "evaluate on the validation splits")
    do_predict: bool = flag(False, "write predictions of the test splits")
    output_dir: str | None = flag(None, "folder for the model, checkpoints and results (required)")
    recipe: str | None = flag(
        None, "settings by name (reference, reference_8p, stable) or a config file; flags override"
    )
    seed: int = flag(42, "of weights, dropout and, without --data_seed, order", "[0, 4294967295]")
    data_seed: int | None = flag(None, "of the order of samples; default: --seed", "[0, 4294967295]")
    resume_from_checkpoint: str | None = flag(None, "checkpoint folder, or auto for the newest sound one")
    allow_changed_data: bool = flag(False, "resume although the training texts, labels or class names are others")
    repeat: str | None = flag(None, "run.json of a finished run: do it once more and compare the weights' hash")
    report_to: str | None = flag(
        None,
        "trackers, several allowed; default: tensorboard where it is installed",
        choices=("none", "all", "tensorboard", "wandb", "mlflow", "swanlab", "trackio"),
        many=True,
    )
    push_to_hub: bool = flag(False, "send the finished model and its card to the hub")
    hub_model_id: str | None = flag(None, "where to: name or owner/name; default: the name of --output_dir")
    hub_token: str | None = flag(None, "token that may write; default: --token, HF_TOKEN, the saved login", secret=True)
    hub_private_repo: bool = flag(False, "a repository made by --push_to_hub is private")
    explain: int = flag(0, "rows of highest loss whose tokens the report shades; 0: off", "[0, inf)")
    run_name: str | None = flag(None, "name shown by trackers")
    disable_tqdm: bool = flag(False, "no progress bar")
    logging_steps: float = flag(
        500, "optimizer steps between log lines, below 1 a share of all; default: less where that gives no 20 lines",
        "(0, 1) or [1, inf)",
    )  # fmt: skip
    logging_first_step: bool = flag(False, "log the first step too")
    log_level: str = flag("info", "least level shown", choices=("debug", "info", "warning", "error", "critical"))


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """Training"""

    per_device_train_batch_size: int = flag(8, "samples per device and forward pass", "[1, inf)")
    per_device_eval_batch_size: int = flag(8, "samples per device and forward pass", "[1, inf)")
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step", "[1, inf)")
    global_batch_size: int | None = flag(
        None,
        "samples per optimizer step on all ranks together; a forward pass then has at most"
        " --per_device_train_batch_size of them per device, and accumulation follows",
        "[1, inf)",
    )
    lr_scaling: str = flag(
        "none",
        "rule that fits --learning_rate to the samples per optimizer step",
        choices=("none", "linear", "sqrt"),
    )
    lr_base_batch_size: int = flag(32, "samples per optimizer step that --learning_rate is meant for", "[1, inf)")
    learning_rate: float = flag(5e-5, "peak, per optimizer step", "[0, inf)")
    weight_decay: float = flag(0.0, "decoupled; not for biases and LayerNorm", "[0, inf)")
    adam_beta1: float = flag(0.9, "decay of the mean gradient", "[0, 1)")
    adam_beta2: float = flag(0.999, "decay of the mean squared gradient", "[0, 1)")
    adam_epsilon: float = flag(1e-8, "added to the denominator", "(0, inf)")
    max_grad_norm: float = flag(1.0, "L2 norm gradients are clipped to; 0: no clipping", "[0, inf)")
    num_train_epochs: float = flag(3.0, "passes over the training data, may be a fraction", "(0, inf)")
    max_steps: int = flag(-1, "optimizer steps, instead of --num_train_epochs; -1: off", "-1 or [1, inf)")
    lr_scheduler_type: str = flag(
        "linear",
        "learning rate after warm-up",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
    )
    warmup_steps: float = flag(0.0, "optimizer steps; below 1: share of all steps", "[0, inf)")
    label_smoothing_factor: float = flag(0.0, "probability spread over the other classes", "[0, 1)")
    layerwise_lr_decay: float = flag(1.0, "factor of the learning rate from each layer to the one below", "(0, 1]")
    reinit_layers: int = flag(0, "top layers that start anew, with BERT's pooler", "[0, inf)")
    ema_decay: float = flag(0.0, "of the averaged weights that are evaluated and saved; 0: no average", "[0, 1)")
    rdrop_alpha: float = flag(0.0, "weight of what two dropout passes differ by (R-Drop)", "[0, inf)")
    fgm_epsilon: float = flag(0.0, "L2 norm of an adversarial move of each row's word embeddings (FGM)", "[0, inf)")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, about 1.3x the time")
    optim: str = flag(
        "adamw_torch_fused",
        "optimizer; where it is not available the nearest is used and named",
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
        False, "compile what lies between attentions, before the first step; token counts round up"
    )
    torch_compile_backend: str | None = flag(None, "of torch.compile; implies --torch_compile; default: inductor")
    torch_compile_mode: str | None = flag(
        None,
        "of inductor; implies --torch_compile",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    cuda_graph: bool = flag(False, "record an optimizer step once a token count, then replay it; CUDA, 16 bits")
    strict_optim: bool = flag(False, "refuse instead of using the nearest optimizer")
    train_sampling_strategy: str = flag("random", "order of samples", choices=("random", "group_by_length"))
    dataloader_drop_last: bool = flag(False, "drop the last, smaller training batch of an epoch")
    dataloader_num_workers: int = flag(0, "accepted; batches are assembled in this process", "[0, inf)")


@dataclass(frozen=True, kw_only=True)
class EvaluationArguments:
    """Evaluation and checkpoints while training"""

    eval_strategy: str = flag("no", "when to evaluate", choices=("no", "steps", "epoch"))
    eval_steps: float | None = flag(
        None, "optimizer steps, below 1 a share of all; default: --logging_steps", "(0, 1) or [1, inf)"
    )
    save_strategy: str = flag("steps", "when to save a checkpoint", choices=("no", "steps", "epoch"))
    save_steps: float = flag(500, "optimizer steps, below 1 a share of all", "(0, 1) or [1, inf)")
    save_total_limit: int | None = flag(None, "checkpoints kept; default: all", "[1, inf)")
    load_best_model_at_end: bool = flag(False, "end with the best checkpoint instead of the last")
    metric_for_best_model: str | None = flag(None, "a metric of the task, or loss; default: its headline")
    greater_is_better: bool | None = flag(None, "default: true, but for loss")
    early_stopping_patience: int | None = flag(None, "evaluations without a gain; default: off", "[1, inf)")
    early_stopping_threshold: float = flag(0.0, "least gain that counts, in the metric's unit", "[0, inf)")
    expect: str | None = flag(
        None, "bounds such as 'mrpc.f1>=0.88', in quotes, several allowed; missed: exit code 8", many=True
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionArguments:
    """Precision"""

    fp16: bool = flag(False, "half precision as set by --fp16_opt_level")
    bf16: bool = flag(False, "bfloat16 as set by --fp16_opt_level")
    fp16_opt_level: str = flag(
        "O1",
        "O0: fp32; O1: autocast; O2: low-precision model, fp32 masters; O3: all low precision",
        choices=("O0", "O1", "O2", "O3"),
    )
    loss_scale: str | None = flag(None, "a positive number, or dynamic; default: 1024, at O3 1; fp16 only")
    use_combine_grad: bool = flag(False, "gradients as views of one flat buffer, fused clip")
    amp_backend: str = flag("auto", "who does mixed precision", choices=("auto", "native", "apex"))
    fallback_precision: str = flag(
        "none",
        "where the device cannot train as asked, none: stop; fp32: train in fp32 and say so",
        choices=("none", "fp32"),
    )
    tf32: bool | None = flag(None, "TensorFloat-32 products; default: the device's")


@dataclass(frozen=True, kw_only=True)
class DeviceArguments:
    """Device and ranks"""

    device: str = flag("auto", "auto, an index, a name, or name:index", pattern=r"[a-z]+(:[0-9]+)?|[0-9]+")
    use_cpu: bool = flag(False, "train on the host although a device is there")
    ddp_timeout: int = flag(1800, "seconds a rank waits for the others", "[1, inf)")
    ddp_backend: str | None = flag(None, "default: the device's own", choices=("hccl", "nccl", "gloo"))
    skip_steps: int = flag(0, "first optimizer steps left out of samples/s", "[0, inf)")
    profile_steps: str | None = flag(
        None, "first:last optimizer step to trace, from 1, both included; writes trace-<rank>.json"
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

    Building one by hand checks nothing; `command_line.parse` does. `notices` are lines for the user
    about flags that were renamed or have no effect here, `given` the flags that the user set (None: built by hand).
    """

    notices: tuple[str, ...] = ()
    given: frozenset[str] | None = field(default=None, compare=False)

    def is_default(self, name: str) -> bool:
        """Whether a flag has its default because the user did not set it."""
        return self.given is not None and name not in self.given


@dataclass(frozen=True)
class Flag:
    """What a field of `Arguments` says about its flag.

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
