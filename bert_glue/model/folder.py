"""The folder of a model: where it lies, its config.json, and what a finished classifier in it was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import Arguments
from bert_glue.config.values import is_path
from bert_glue.errors import MachineError, UsageError, first_line
from bert_glue.hub import client
from bert_glue.model.bounds import check_config
from bert_glue.model.description import decision_of, read_description
from bert_glue.storage.files import check_not_lfs_pointer, json_object
from bert_glue.tasks import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TASKS, GlueTask, own_task


def model_folder(name: str, args: Arguments, flag: str = "--model_name_or_path") -> Path:
    """A local folder as it is, or the hub's files of a model name, downloaded or cached.

    Raises:
        MachineError: neither a folder nor to be had from the hub; the message says what to do.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if is_path(name):
        raise MachineError(f"{flag} {name}: no such folder")
    if args.hub == "modelscope":
        from bert_glue.hub import modelscope

        return modelscope.fetch_model(name, args)
    # The hub's client waits for minutes if a server accepts a connection and never answers.
    probe = client.start_probe()
    unreachable = probe.wait() if probe else "HF_HUB_OFFLINE is set"
    try:
        return client.fetch_model(name, args, is_offline=unreachable is not None)
    except Exception as error:  # the hub client raises a dozen kinds; each means "not to be had"
        why = unreachable or first_line(error)
        if isinstance(error, client.DamagedFileError):
            why = str(error)
        raise MachineError(
            f"{flag} {name}: neither a local folder nor to be had from the hub ({why}); "
            "put config.json, the tokenizer's files and model.safetensors into a folder and give its path, "
            "or set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 with a warm cache"
        ) from error


def read_config(folder: Path) -> dict:
    """config.json of a model folder.

    Raises:
        MachineError: missing, a Git-LFS pointer, not JSON, or without a model_type and not BERT's.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise MachineError(
            f"{folder} holds adapters alone; give the folder of the merged model, one above if it is ours"
        )
    if not path.is_file():
        raise MachineError(f"{folder} has no config.json")
    check_not_lfs_pointer(path)
    try:
        config = json_object(path)
    except (OSError, ValueError) as error:
        raise MachineError(f"{path} cannot be read: {error}") from error
    check_config(config, path)
    if not config.get("model_type"):
        if not _is_bert_shaped(config):
            raise MachineError(f'{path} has no model_type; add it, for example "model_type": "bert"')
        config["model_type"] = "bert"
    return config


def guessed_type(folder: Path) -> list[str]:
    """A line for the log where `read_config` took a config.json without model_type for BERT's."""
    stored = json_object(folder / "config.json")
    named = "config.json has no model_type; its keys are BERT's, so the model is read as BERT"
    return [] if stored.get("model_type") else [named]


# The sizes in Google's bert_config.json, and keys by which relatives with the same sizes are told.
_BERT_KEYS = {
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "type_vocab_size", "vocab_size",
}  # fmt: skip
_RELATIVES_KEYS = {
    "bos_token_id", "embedding_size", "eos_token_id", "max_2d_position_embeddings", "max_relative_position",
    "relative_attention", "task_type_vocab_size",
}  # fmt: skip


def _is_bert_shaped(config: dict) -> bool:
    """True for a config of BERT alone: its derivatives have the same keys, and name their class or have more keys."""
    architectures = config.get("architectures") or ["Bert"]
    return (
        config.keys() >= _BERT_KEYS
        and config["type_vocab_size"] > 1
        and not config.keys() & _RELATIVES_KEYS
        and all(str(name).startswith("Bert") for name in architectures)
    )


def task_of_model(folder: Path, asked: str | None = None) -> tuple[GlueTask, dict[str, Any]]:
    """What a saved classifier was trained on, and what lies beside its weights (see `description`).

    Args:
        asked: `--problem_type`, which counts where config.json has none.

    Raises:
        MachineError: it has no config.json, or what lies beside it is damaged.
        UsageError: config.json has another problem_type, or the model has not as many outputs as that kind.
    """
    config = read_config(folder)
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # what transformers leaves out
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    kind = config.get("problem_type") or _asked_kind(asked, labels, folder)
    if asked is not None and kind != asked:
        raise UsageError(f"--problem_type {asked}: {folder / 'config.json'} says {kind}; leave the flag out")
    is_multi_label = kind == MULTI_LABEL
    is_regression = kind == REGRESSION or (len(labels) == 1 and not is_multi_label)
    known = TASKS.get(config.get("finetuning_task") or "")
    settings = read_description(folder)
    if known is not None and not is_multi_label and known.labels == (() if is_regression else labels):
        return replace(known, decision=decision_of(settings)), settings
    name = str(config.get("finetuning_task") or "own")
    task = own_task(name, (), () if is_regression else labels, is_multi_label)
    return replace(task, label_delimiter=settings.get("label_delimiter"), decision=decision_of(settings)), settings


def _asked_kind(asked: str | None, labels: tuple[str, ...], folder: Path) -> str | None:
    """`--problem_type` for a model whose config.json has none.

    Raises:
        UsageError: a regression has one output, one label of several needs two.
    """
    if (asked == REGRESSION and len(labels) > 1) or (asked == SINGLE_LABEL and len(labels) < 2):
        raise UsageError(f"--problem_type {asked}: the model in {folder} has {len(labels)} output(s)")
    return asked


def kind_notes(config: dict, args: Arguments, task: GlueTask) -> list[str]:
    """A line where config.json does not say whether a finished model's rows have one label or several."""
    names = config.get("id2label") or {}
    if args.do_train or config.get("problem_type") or task.is_official or len(names) < 3:
        return []
    if task.is_multi_label:
        return [f"config.json has no problem_type: {MULTI_LABEL}, as --problem_type says"]
    return [
        f"config.json has no problem_type: its {len(names)} classes are read as one label a row, as by "
        f"transformers.pipeline; --problem_type {MULTI_LABEL} reads several"
    ]


def finished_task(args: Arguments) -> GlueTask | None:
    """What the classifier that `--model_name_or_path` names was trained on; None for an encoder without one.

    `columns` are () where they are not known.

    Raises:
        MachineError: no such model, or it has no config.json.
    """
    flag = "--config_name" if args.config_name else "--model_name_or_path"
    folder = model_folder(args.config_name or args.model_name_or_path, args, flag)
    config = read_config(folder)
    architectures = [str(name) for name in config.get("architectures") or ()]
    is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    if not is_classifier and (architectures or "id2label" not in config):
        return None
    task, settings = task_of_model(folder, args.problem_type)
    columns, delimiter = settings.get("text_columns") or task.columns, settings.get("text_column_delimiter")
    return replace(task, columns=tuple(columns), text_delimiter=delimiter)


def check_problem_type(config: dict, task: GlueTask, folder: Path, asked: str | None) -> None:
    """Hold the kind of a finished model against a task's.

    Args:
        asked: `--problem_type`, which counts where config.json has none.

    Raises:
        MachineError: the model gives one label a row and the task has several, or the reverse.
    """
    has_several = (config.get("problem_type") or asked) == MULTI_LABEL
    if has_several != task.is_multi_label:
        raise MachineError(
            f"{folder / 'config.json'}: the model's problem_type is {config.get('problem_type') or SINGLE_LABEL}, "
            f"{task.name} is {task.problem_type}: no score is right; train a model for it"
        )
