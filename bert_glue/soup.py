"""`bert-glue soup RUN RUN... --output_dir FOLDER` makes one model with the mean of several runs' weights.

The runs start from the same pre-trained weights and differ in their seed or settings (the uniform soup of Wortsman et
al. 2022, arXiv 2203.05482). At inference a soup costs as much as one model, unlike an ensemble (`bert-glue predict
--model RUN RUN...`). Runs whose heads started from different random weights may not lie in one basin, so score the
soup before you use it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bert_glue.config.command_line import CommandParser
from bert_glue.errors import MachineError, UsageError, exit_code_of, print_lines, run_program
from bert_glue.launch.requirements import refuse_unusable
from bert_glue.storage.files import RECORD_FILE, json_object, write_json

# Fields of config.json that do not affect what the model computes.
_NAMES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def check_alike(folders: list[Path]) -> dict[str, Any]:
    """Check that the runs can be averaged.

    Returns:
        config.json of the first run.

    Raises:
        UsageError: two runs have the same weights, or differ in more than their weights; the message names the first
            difference.
        MachineError: a folder does not have a model.
    """
    from bert_glue.data.tokenization import TextTokenizer
    from bert_glue.model.folder import read_config

    found: dict[Path, dict[str, Any]] = {}
    hashes: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise MachineError(f"{folder}: no such folder")
        config = {name: value for name, value in read_config(folder).items() if name not in _NAMES}
        if not config.get("id2label"):
            raise MachineError(f"{folder} is not a fine-tuned classifier")
        weights = _weights_hash(folder)
        if weights in hashes:
            raise UsageError(f"{folder} has the same weights as {hashes[weights]}")
        hashes[weights] = folder
        pretrained = {"pre-trained weights (run.json)": _start(folder)}
        tokenizer = {"tokenizer": TextTokenizer(folder, read_config(folder)).fingerprint}
        found[folder] = config | pretrained | tokenizer
    first = folders[0]
    for folder, facts in found.items():
        for name in sorted(found[first].keys() | facts.keys()):
            then = found[first].get(name)
            now = facts.get(name)
            if then != now:
                short = f": {then!r} and {now!r}" if len(f"{then}{now}") < 100 else ""
                raise UsageError(f"{first} and {folder} differ in {name}{short}: their weights cannot be averaged")
    return read_config(first)


# What belongs to a model and is none of its weights (`bert_glue.json`).
_BESIDE = ("text_columns", "text_column_delimiter", "max_seq_length", "doc_stride", "max_windows", "label_threshold",
           "label_delimiter")  # fmt: skip


def description_of(folders: list[Path]) -> tuple[dict[str, Any], list[str]]:
    """What lies beside the mean of the runs' weights: the first run's, without a calibration; and log lines.

    Raises:
        UsageError: the runs read the same columns in another order.
    """
    from bert_glue.model.description import read_description, uncalibrated

    found = [read_description(folder) for folder in folders]
    notes = []
    for name in _BESIDE:
        values = [description.get(name) for description in found]
        other = next((at for at, value in enumerate(values) if value != values[0]), None)
        if other is None:
            continue
        differ = f"{folders[0]} and {folders[other]} differ in {name}: {values[0]!r} and {values[other]!r}"
        if name == "text_columns" and None not in values and sorted(values[0]) == sorted(values[other]):
            raise UsageError(f"{differ}: the weights read their texts in another order and cannot be averaged")
        notes.append(f"note: {differ}; the soup has that of the first")
    if calibrated := [str(folder) for folder, one in zip(folders, found, strict=True) if "calibration" in one]:
        notes.append(
            f"note: the soup has no calibration: that of {', '.join(calibrated)} is for other weights "
            "(--calibrate with --do_train chooses one)"
        )
    return uncalibrated(found[0]), notes


def _weights_hash(folder: Path) -> str:
    """SHA-256 of the weights file; for shards, SHA-256 of the shards' hashes."""
    from bert_glue.model.weights import weight_files
    from bert_glue.storage.files import file_hash

    hashes = [file_hash(file) for file in weight_files(folder, allow_pickle=False)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _start(folder: Path) -> Any:
    """Hashes of the weights from which a run started; None if the run does not record them."""
    try:
        return json_object(folder / RECORD_FILE).get("model_sha256")
    except (OSError, ValueError):
        return None


def mean_weights(folders: list[Path]) -> dict[str, Any]:
    """The mean of the runs' weights, computed in fp64. Only one run at a time is in memory beside it.

    Raises:
        UsageError: names, shapes or types of weights differ.
    """
    from bert_glue.model.weights import read_tensors, weight_files

    total: dict[str, Any] = {}
    kinds = {}
    for folder in folders:
        tensors = read_tensors(weight_files(folder, False))
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if kinds and shapes != kinds:
            other = sorted(name for name in shapes.keys() | kinds.keys() if shapes.get(name) != kinds.get(name))
            raise UsageError(f"{folders[0]} and {folder} differ in names, shapes or types of weights: {other[0]}")
        kinds = shapes
        for name, tensor in tensors.items():
            total[name] = tensor.double() + total[name] if name in total else tensor.double()
    return {name: (tensor / len(folders)).to(kinds[name][1]).contiguous() for name, tensor in total.items()}


def average_runs(folders: list[Path], output_dir: Path) -> None:
    """Write the model, its tokenizer and soup.json, which lists the runs.

    Raises:
        UsageError: see `check_alike`; or `output_dir` is one of the runs, or already has a model.
        CheckpointError: it cannot be written.
    """
    from safetensors.torch import save_file

    from bert_glue.data.tokenization import TextTokenizer
    from bert_glue.model.description import write_description
    from bert_glue.storage import checkpoint, files

    if (output_dir / "config.json").exists():
        raise UsageError(f"--output_dir {output_dir}: the folder already has a model; choose another")
    config = check_alike(folders)
    description, notes = description_of(folders)
    tensors = mean_weights(folders)
    made_of = [{"run": str(folder), "sha256": _weights_hash(folder)} for folder in folders]

    def write(into: Path) -> None:
        save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
        (into / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_json(into / "soup.json", {"mean_of": made_of})
        TextTokenizer(folders[0], config).save(into)
        dtype = str(next(iter(tensors.values())).dtype).split(".")[1]
        write_description(into, description, dtype)

    with files.plain_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.replace_files(output_dir, write)
    print_lines(
        *notes,
        f"{output_dir}: mean of {len(folders)} runs, not scored yet; "
        f"to score it, run bert-glue eval --model_name_or_path {output_dir}",
    )


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 usage or runs that do not match, 4 no model found, 5 weights not finite, 6 not written."""
    parser = CommandParser(
        same={"model_name_or_path": "RUN"}, prog="bert-glue soup", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run or a checkpoint")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the new model")
    options = parser.parse_args(argv)
    if len(options.runs) < 2:
        parser.error("give at least two runs")

    def answer() -> int:
        refuse_unusable()
        average_runs(options.runs, options.output_dir)
        return 0

    return exit_code_of(answer)


if __name__ == "__main__":
    run_program(main)
