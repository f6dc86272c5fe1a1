"""`--repeat run.json`: repeats a run in another folder and compares the results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bert_glue.errors import DataError, MachineError, UsageError
from bert_glue.storage.files import json_object

# Flags whose value may be a path relative to the folder in which the run was started.
_PATHS = (
    "model_name_or_path", "config_name", "tokenizer_name", "cache_dir", "data_path", "train_file", "validation_file",
    "test_file", "class_weights", "dataset_name", "output_dir",
)  # fmt: skip
# A resumed run equals an undisturbed one. A repeated run uploads nothing for its user.
_NOT_REPEATED = ("repeat", "resume_from_checkpoint", "push_to_hub")


def read_run(path: str) -> dict[str, Any]:
    """run.json of a finished run.

    Raises:
        UsageError: the file is not a run.json, or its run did not finish or was resumed with other settings.
    """
    try:
        record = json_object(Path(path))
        arguments, data = _field(record, "arguments", dict), _field(record, "data", dict)
        for part, name, kind in (
            (record, "working_directory", str),
            (record, "scores", dict),
            (record, "weights_sha256", str | None),
            (data, "sha256", dict),
            (arguments, "output_dir", str),
            (arguments, "do_train", bool),
        ):
            _field(part, name, kind)
        changes = [str(change) for change in _field(record, "changes", list)]
        for name in ("packages", "model_sha256"):  # earlier versions may lack them
            _field({name: {}, **record}, name, dict)
    except OSError as error:
        raise UsageError(f"--repeat {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--repeat {path}: not the run.json of a run: {error}") from None
    if record["weights_sha256"] is None and arguments["do_train"]:
        raise UsageError(f"--repeat {path}: that run did not finish")
    if changes:
        raise UsageError(f"--repeat {path}: that run was resumed with other settings, {'; '.join(changes)}")
    return record


def _field(part: dict[str, Any], name: str, kind: Any) -> Any:
    """A field of a file from others; ValueError if it is missing or has another type."""
    if name not in part:
        raise ValueError(f"it has no {name!r}")
    if not isinstance(part[name], kind):
        raise ValueError(f"its {name!r} is {str(part[name])[:40]!r}")
    return part[name]


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """Flags of the repeated run: those of the first run, with an output folder beside the first one's."""
    started_in, settings = Path(record["working_directory"]), {}
    has_moved = started_in != Path.cwd()
    for name, value in record["arguments"].items():
        if name in _NOT_REPEATED:
            continue
        # os.path returns False for a name that no file can have; pathlib raises.
        if has_moved and name in _PATHS and isinstance(value, str) and os.path.exists(started_in / value):
            value = str(started_in / value)
        settings[name] = f"{value}-repeat" if name == "output_dir" else value
    return settings


def check_inputs(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs from the first run.

    Args:
        now: run.json of the repeated run, as far as it is known before training.

    Returns:
        Lines about what may change the result.

    Raises:
        DataError: the rows or the weights of the classes differ.
        MachineError: the starting weights differ.
    """
    then = record["data"]["sha256"]
    other = [name for name, value in now["data"]["sha256"].items() if then.get(name) != value]
    if other:
        raise DataError(
            f"--repeat: the rows of {', '.join(other)} are not those of the first run ({record_source(now)})"
        )
    if record.get("class_weights") != now.get("class_weights"):
        raise DataError("--repeat: --class_weights gives other weights than in the first run")
    if record.get("model_sha256") != now["model_sha256"]:
        files = ", ".join(now["model_sha256"])
        raise MachineError(f"--repeat: the model's files are not those that the first run started from: {files}")
    facts = {**_facts(record), **{name: None for name in _facts(now) if name not in _facts(record)}}
    return [
        f"repeated with {name} {value} instead of {facts[name]}: the result may differ"
        for name, value in _facts(now).items()
        if facts[name] != value
    ]


def record_source(record: dict[str, Any]) -> str:
    """The source of a run's rows."""
    return str(record["data"]["source"])


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    names = ("bert_glue", "python", "device_name", "world_size")
    return {**{name: record.get(name) for name in names}, **record.get("packages", {})}


def check_outcome(record: dict[str, Any], now: dict[str, Any]) -> str:
    """A line that says that both runs have the same result.

    Raises:
        MachineError: the results differ, because the machines differ.
    """
    if record["weights_sha256"] != now["weights_sha256"]:
        raise MachineError(
            f"--repeat: the weights differ from the first run's (sha256 {now['weights_sha256']}, "
            f"was {record['weights_sha256']}); the notes above name the differences"
        )
    other = [f"{name} {value} (was {record['scores'].get(name)})" for name, value in now["scores"].items()
             if record["scores"].get(name) != value]  # fmt: skip
    if other:
        raise MachineError(f"--repeat: the scores differ from the first run's: {', '.join(other)}")
    weights = f"weights with sha256 {now['weights_sha256']}" if now["weights_sha256"] else "scores"
    return f"repeat: the same {weights}"
