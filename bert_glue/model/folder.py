"""Finds the folder of a model, and reads its config.json and the task of a fine-tuned classifier."""

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
    """The local folder `name`, or the folder with the downloaded or cached files of a model on the hub.

    Raises:
        MachineError: there is neither such a folder nor such a model. The message names the ways out.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if is_path(name):
        raise MachineError(f"{flag} {name}: there is no such folder")
    if args.hub == "modelscope":
        from bert_glue.hub import modelscope

        return modelscope.fetch_model(name, args)
    # The client of the hub waits for minutes if a server accepts a connection but never answers.
    probe = client.start_probe()
    unreachable = probe.wait() if probe else "HF_HUB_OFFLINE is set"
    try:
        return client.fetch_model(name, args, is_offline=unreachable is not None)
    except Exception as error:  # the client raises a dozen types, and all mean that there is no model
        why = unreachable or first_line(error)
        if isinstance(error, client.DamagedFileError):
            why = str(error)
        raise MachineError(
            f"{flag} {name} is not a local folder and cannot be fetched from the hub ({why}); "
            "put config.json, the tokenizer files and model.safetensors into a folder and give its path, "
            "or set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 with a filled cache"
        ) from error


def read_config(folder: Path) -> dict:
    """Reads config.json of a model folder.

    Raises:
        MachineError: the file is missing, a Git LFS pointer or not JSON, or has no model_type and is not of BERT.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise MachineError(
            f"{folder} holds only adapters; give the folder of the merged model (of a run here: the folder above)"
        )
    if not path.is_file():
        raise MachineError(f"{folder} has no config.json; give the folder of a model")
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
    """A log line if `read_config` has read a config.json without model_type as BERT."""
    stored = json_object(folder / "config.json")
    named = "config.json has no model_type; its keys are those of BERT, so the model is read as BERT"
    return [] if stored.get("model_type") else [named]


# The sizes in Google's bert_config.json, and the keys that tell other families with the same sizes from BERT.
_BERT_KEYS = {
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "type_vocab_size", "vocab_size",
}  # fmt: skip
_RELATIVES_KEYS = {
    "bos_token_id", "embedding_size", "eos_token_id", "max_2d_position_embeddings", "max_relative_position",
    "relative_attention", "task_type_vocab_size",
}  # fmt: skip


def _is_bert_shaped(config: dict) -> bool:
    """True for a config of BERT. Derived families have the same keys, but name their class or have more keys."""
    architectures = config.get("architectures") or ["Bert"]
    return (
        config.keys() >= _BERT_KEYS
        and config["type_vocab_size"] > 1
        and not config.keys() & _RELATIVES_KEYS
        and all(str(name).startswith("Bert") for name in architectures)
    )


def task_of_model(folder: Path, asked: str | None = None) -> tuple[GlueTask, dict[str, Any]]:
    """The task of a saved classifier, and the description beside its weights (see model/description.py).

    Args:
        asked: `--problem_type`, which is used if config.json has none.

    Raises:
        MachineError: the folder has no config.json, its description is damaged, or its answers are ambiguous: two
            classes with one name, several scores per row.
        UsageError: config.json has another problem_type, or the number of outputs does not fit it.
    """
    config = read_config(folder)
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers does not write these defaults
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    _check_outputs(config, labels, folder)
    kind = stated_kind(config) or _asked_kind(asked, labels, folder)
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


def stated_kind(config: dict) -> str | None:
    """The problem_type of a config.json; None where it has none, or one that transformers does not know either."""
    kind = config.get("problem_type")
    return kind if kind in (SINGLE_LABEL, MULTI_LABEL, REGRESSION) else None


def _check_outputs(config: dict, labels: tuple[str, ...], folder: Path) -> None:
    path = folder / "config.json"
    if twice := sorted({name for name in labels if labels.count(name) > 1}):
        raise MachineError(f"{path}: id2label gives several classes the name {twice[0]!r}; give each its own")
    if stated_kind(config) == REGRESSION and len(labels) > 1:
        raise MachineError(
            f"{path}: problem_type regression with {len(labels)} outputs: models of one score a row are supported"
        )


def _asked_kind(asked: str | None, labels: tuple[str, ...], folder: Path) -> str | None:
    """`--problem_type` for a model whose config.json has none.

    Raises:
        UsageError: the number of outputs does not fit: a regression has one, one label per row needs two or more.
    """
    if (asked == REGRESSION and len(labels) > 1) or (asked == SINGLE_LABEL and len(labels) < 2):
        raise UsageError(f"--problem_type {asked}: the model in {folder} has {len(labels)} output(s)")
    return asked


def notes_on_quantization(config: dict) -> list[str]:
    """A line where transformers would quantize the weights of a folder as it loads them."""
    if not config.get("quantization_config"):
        return []
    return ["config.json's quantization_config is not applied: the weights are used as they are stored"]


def kind_notes(config: dict, args: Arguments, task: GlueTask) -> list[str]:
    """A note if config.json does not state whether rows have one label or several."""
    names = config.get("id2label") or {}
    if args.do_train or stated_kind(config) or task.is_official or len(names) < 3:
        return []
    stored = config.get("problem_type")
    said = f"config.json has the unknown problem_type {stored!r}" if stored else "config.json has no problem_type"
    if task.is_multi_label:
        return [f"{said}; --problem_type {MULTI_LABEL} is used"]
    return [
        f"{said}, so its {len(names)} classes are read as one label per row, as in "
        f"transformers.pipeline; --problem_type {MULTI_LABEL} allows several"
    ]


def finished_task(args: Arguments) -> GlueTask | None:
    """The task of the classifier in `--model_name_or_path`. None for an encoder without a classifier.

    `columns` are () if they are not known.

    Raises:
        MachineError: there is no such model, or it has no config.json.
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
    """Checks that a fine-tuned model and a task both have one label per row, or both several.

    Args:
        asked: `--problem_type`, which is used if config.json has none.

    Raises:
        MachineError: the model has one label per row and the task several, or the reverse.
    """
    has_several = (stated_kind(config) or asked) == MULTI_LABEL
    if has_several != task.is_multi_label:
        raise MachineError(
            f"{folder / 'config.json'}: the model's problem_type is {config.get('problem_type') or SINGLE_LABEL}, but "
            f"{task.name} is {task.problem_type}; train a model for it (--do_train)"
        )
