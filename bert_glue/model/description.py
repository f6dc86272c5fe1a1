"""`bert_glue.json`: the facts about a model that no file of transformers holds, such as text columns and thresholds.

It is written only together with the weights, into the folder of a run and into every checkpoint. A later evaluation or
prediction in the same folder does not change it. It holds no paths of the machine, so it can be published.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_glue import __version__
from bert_glue.config.arguments import FLAGS, Arguments
from bert_glue.errors import MachineError, UsageError
from bert_glue.storage.checkpoint import step_of
from bert_glue.storage.files import RECORD_FILE, RESULTS_FILE, file_hash, json_object, write_json
from bert_glue.tasks import Decision, GlueTask

if TYPE_CHECKING:
    from bert_glue.data.sources import TaskData
    from bert_glue.data.tokenization import TextTokenizer

FILE = "bert_glue.json"
# Groups of flags that determine the weights, unlike those about where the run took place.
_RECIPE = ("Training", "Precision")
_RECIPE_FLAGS = ("seed", "data_seed", "max_train_samples", "freeze_encoder", "lora_rank", "lora_alpha", "lora_dropout")


def describe(
    args: Arguments, data: TaskData, tokenizer: TextTokenizer, max_length: int, record: dict[str, Any]
) -> dict[str, Any]:
    """The description of the model that this run trains, as far as it is known before training.

    Args:
        max_length: the largest number of tokens in a sequence.
        record: the content of run.json.
    """
    names = [name for name, flag in FLAGS.items() if flag.group in _RECIPE or name in _RECIPE_FLAGS]
    several = {"label_delimiter": data.task.label_delimiter, **decision_facts(data.task.decision)}
    return {
        "bert_glue": __version__,
        "task_name": data.task.name,
        "text_columns": list(data.task.columns),
        "text_column_delimiter": data.task.text_delimiter,
        "max_seq_length": max_length,
        **({} if args.doc_stride is None else {"doc_stride": args.doc_stride, "max_windows": args.max_windows}),
        **(several if data.task.is_multi_label else {}),
        "tokenizer_sha256": tokenizer.fingerprint,
        "recipe": {
            **{name: getattr(args, name) for name in names if not FLAGS[name].secret},
            "class_weights": record.get("class_weights"),  # the numbers, because the flag may name a file
        },
        "data_sha256": record["data"]["sha256"],
        "model_sha256": record["model_sha256"],
    }


def decision_facts(decision: Decision) -> dict[str, Any]:
    """The entries of a decision in the file."""
    return {"label_threshold": decision.threshold}


def decision_of(description: dict[str, Any]) -> Decision:
    """The decision in a description. Missing values have the defaults of transformers."""
    threshold, chosen = description.get("label_threshold", Decision().threshold), description.get("calibration")
    if chosen is None:
        return Decision(threshold)
    return Decision(chosen.get("threshold", threshold), chosen["temperature"], is_calibrated=True)


def add_calibration(folder: Path, facts: dict[str, Any]) -> None:
    """Adds the choice of `--calibrate` to the file in `folder`.

    Args:
        facts: the temperature, and the threshold if the task has one.
    """
    write_json(folder / FILE, {**json_object(folder / FILE), "calibration": facts})


def uncalibrated(description: dict[str, Any]) -> dict[str, Any]:
    """The description without the calibration, for weights that `--calibrate` has not seen."""
    return {name: value for name, value in description.items() if name != "calibration"}


def with_decision(task: GlueTask, description: dict[str, Any], args: Arguments) -> GlueTask:
    """The task with the decision of a finished model or of `--label_threshold`.

    Args:
        description: the description of the model, which is ignored if the model is trained.

    Raises:
        UsageError: `--label_threshold` is given, but each row has one label.
    """
    decision = task.decision if args.do_train else decision_of(description)
    if args.label_threshold is not None:
        if not task.is_multi_label:
            raise UsageError(
                f"--label_threshold {args.label_threshold:g} needs several labels per row; here each row has one"
            )
        decision = replace(decision, threshold=args.label_threshold)
    return replace(task, decision=decision)


def write_description(folder: Path, description: dict[str, Any], dtype: str) -> None:
    """Writes the file beside model.safetensors in `folder`, unless `description` is empty.

    Args:
        dtype: the dtype of the stored weights, such as float32.
    """
    if description:
        whole = {**description, "dtype": dtype, "weights_sha256": file_hash(folder / "model.safetensors")}
        text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
        # A foreign file may bring half a surrogate pair, which JSON can hold if it is escaped.
        (folder / FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def read_description(folder: Path) -> dict[str, Any]:
    """The description of the model in `folder`. Without the file, what the results of the run hold; else {}.

    Raises:
        MachineError: a file is damaged.
    """
    if (folder / RECORD_FILE).is_file():  # raises if run.json is damaged, even if it is not needed
        _read(folder / RECORD_FILE)
    if (folder / FILE).is_file():
        own = _checked(folder / FILE, _read(folder / FILE))
        finished = _calibrated_run(folder)
        if finished.get("weights_sha256") == own.get("weights_sha256") and "calibration" in finished:
            return {**own, "calibration": finished["calibration"]}
        return own
    # Earlier versions only wrote these facts into the results of the run, one folder above a checkpoint.
    for place in (folder, folder.parent) if step_of(folder) >= 0 else (folder,):
        record, results = place / RECORD_FILE, place / RESULTS_FILE
        if record.is_file() and results.is_file():
            arguments = _read(record).get("arguments")
            length = arguments.get("max_seq_length") if isinstance(arguments, dict) else None
            found = {"max_seq_length": length, "text_columns": _read(results).get("text_columns")}
            return _checked(record, {name: value for name, value in found.items() if value is not None})
    return {}


def _calibrated_run(checkpoint: Path) -> dict[str, Any]:
    """The description of the finished, calibrated run that a checkpoint lies in; {} where there is none."""
    path = checkpoint.parent / FILE
    if step_of(checkpoint) < 0 or not path.is_file():
        return {}
    found = _checked(path, _read(path))
    return found if "calibration" in found else {}


def notes_on_calibration(folder: Path) -> list[str]:
    """A line where a checkpoint's answers are those of no calibration, but the finished run's are."""
    if not _calibrated_run(folder) or "calibration" in read_description(folder):
        return []
    return [
        f"{folder} has no calibration: --calibrate chose that of {folder.parent} for the finished weights, which are "
        "others; answers are those without it"
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json_object(path)
    except (OSError, ValueError) as error:
        raise MachineError(f"{path} cannot be read ({error}); remove it and give the flags that it replaces") from None


def _checked(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    length, columns = found.get("max_seq_length"), found.get("text_columns")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 3):
        raise MachineError(f"{path}: max_seq_length is {str(length)[:40]!r}, not an integer of at least 3")
    for name, least in (("doc_stride", -1), ("max_windows", 1)):
        value = found.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise MachineError(f"{path}: {name} is {str(value)[:40]!r}, not an integer of at least {least}")
    is_list = isinstance(columns, list) and all(isinstance(name, str) for name in columns)
    if columns is not None and not (is_list and columns):
        raise MachineError(f"{path}: text_columns is {str(columns)[:40]!r}, not a list of names")
    for name in ("text_column_delimiter", "label_delimiter"):
        if not isinstance(found.get(name), str | None):
            raise MachineError(f"{path}: {name} is {found[name]!r}, not a text")
    chosen = found.get("calibration", {"temperature": 1.0})
    if not isinstance(chosen, dict):
        raise MachineError(f"{path}: calibration is {str(chosen)[:40]!r}, not an object")
    temperature = chosen.get("temperature")
    if not isinstance(temperature, float) or not 0 < temperature < 1e6:
        raise MachineError(f"{path}: temperature is {str(temperature)[:40]!r}, not a number above 0")
    for name, threshold in (("label_threshold", found.get("label_threshold", 0.5)),
                            ("threshold", chosen.get("threshold", 0.5))):  # fmt: skip
        if not isinstance(threshold, float) or not 0 < threshold < 1:
            raise MachineError(f"{path}: {name} is {str(threshold)[:40]!r}, not a probability between 0 and 1")
    return found
