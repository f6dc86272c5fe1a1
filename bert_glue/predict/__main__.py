"""Labels a file or a stream with a fine-tuned model: `python -m bert_glue.predict --model RUN --input FILE`.

Several models form an ensemble, which predicts from the mean of their probabilities or scores. Rows are read,
tokenized, labelled and written in chunks, so memory does not grow with the file. The output has all columns of the
input, then `prediction` and, for classes, `probability_<label>`, rounded to 6 decimals. Several labels of a row are a
list in jsonl and parquet, and one text in csv and tsv. If the command is killed, the same command continues where it
stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_glue.config.command_line import CommandParser
from bert_glue.data.streaming import STANDARD, STREAMED, stream_tables
from bert_glue.errors import DataError, UsageError, exit_code_of, print_lines, run_program
from bert_glue.launch.requirements import refuse_unusable

if TYPE_CHECKING:
    from bert_glue.config.arguments import Arguments
    from bert_glue.data.tables import Table
    from bert_glue.predict.labeller import Labeller
    from bert_glue.predict.output import ToFile, ToStandardOutput

_BATCHES_PER_CHUNK = 64  # enough to sort rows by length; a kill loses at most the work of one chunk
_SECONDS_BETWEEN_LINES = 10.0


def _hash_with(so_far: str, table: Table) -> str:
    return hashlib.sha256((so_far + repr(table.columns)).encode("utf-8", "surrogatepass")).hexdigest()


def _skip(tables: Iterator[Table], output: ToFile | ToStandardOutput) -> str:
    """Skips the rows that are already labelled, and returns their hash.

    Raises:
        DataError: these rows differ from the rows that were labelled.
    """
    rows, digest = 0, ""
    while rows < output.rows and (table := next(tables, None)) is not None:
        rows, digest = rows + len(table), _hash_with(digest, table)
    if rows != output.rows or digest != output.input_hash:
        raise DataError(
            f"--input: its first {output.rows} rows are not the rows labelled so far; "
            "--overwrite starts from the beginning"
        )
    return digest


def run(options: argparse.Namespace) -> int:
    """Labels the whole input and returns 0.

    Raises:
        UserError: an error of usage, data (file:line), machine or disk, or diverged weights, each with its exit code.
    """
    refuse_unusable()
    from bert_glue.config.arguments import Arguments
    from bert_glue.data.own.columns import ColumnFlags
    from bert_glue.model.folder import model_folder, task_of_model
    from bert_glue.predict.labeller import build_labeller, columns_of, delimiter_of, ensemble_threshold
    from bert_glue.predict.output import ToFile, ToStandardOutput
    from bert_glue.training.setup import settle_threads

    input_kind, output_kind = _kind(options, "input"), _kind(options, "output")
    log = sys.stderr if options.output == STANDARD else sys.stdout
    args = Arguments(
        model_name_or_path=options.model[0], device=options.device, bf16=options.bf16, fp16=options.fp16,
        per_device_eval_batch_size=options.per_device_eval_batch_size, trust_remote_code=options.trust_remote_code,
        problem_type=options.problem_type,
    )  # fmt: skip
    folders = [model_folder(name, args) for name in options.model]
    tasks = [task_of_model(folder, options.problem_type) for folder in folders]
    threshold, said = ensemble_threshold(options.model, [task for task, _ in tasks], options.label_threshold)
    delimiter = delimiter_of(options.label_delimiter, [task for task, _ in tasks], output_kind)
    chunk = _BATCHES_PER_CHUNK * args.per_device_eval_batch_size
    tables = stream_tables(options.input, input_kind, chunk)
    first = next(tables)
    flags = ColumnFlags(tuple(options.text_column_names or ()), options.label_column_name)
    print_lines(*first.notes, file=log)
    alone = []
    for name, (own_task, own) in zip(options.model, tasks, strict=True):
        columns, lines = columns_of(own_task, own, flags, first)
        print_lines(*lines, file=log)
        text_delimiter = own.get("text_column_delimiter") or (" " if len(columns) > 2 else None)
        reads = replace(own_task, columns=columns, text_delimiter=text_delimiter)
        alone.append(build_labeller(replace(args, model_name_or_path=name, **_lengths(options, own)), reads))
        for note in alone[-1].model.notes:
            print_lines(f"note: {note}", file=log)
    for line in said:
        print_lines(f"note: {line}", file=log)
    labeller = replace(alone[0], others=tuple(alone[1:]), threshold=threshold, delimiter=delimiter)
    settle_threads(args, labeller.evaluator.ranks.device, [one.model for one in alone])
    output: ToFile | ToStandardOutput = (
        ToStandardOutput(output_kind, options.keep_formulas)
        if options.output == STANDARD
        else ToFile(
            options.output,
            output_kind,
            {**_identity(args, labeller, output_kind), "keep_formulas": options.keep_formulas},
            overwrite=options.overwrite,
            keep_formulas=options.keep_formulas,
        )
    )
    try:
        _label_all(labeller, _from_first(first, tables), output, log)
    finally:
        output.close()
    return 0


def _lengths(options: argparse.Namespace, own: dict[str, Any]) -> dict[str, int]:
    """The flags on the length of rows: as given, else as in training. A flag that neither sets is left out."""
    given = {name: getattr(options, name) for name in ("max_seq_length", "doc_stride", "max_windows")}
    chosen = {name: own.get(name) if value is None else value for name, value in given.items()}
    return {name: value for name, value in chosen.items() if value is not None}


def _from_first(first: Table, rest: Iterator[Table]) -> Iterator[Table]:
    yield first
    yield from rest


def _label_all(labeller: Labeller, tables: Iterator[Table], output: ToFile | ToStandardOutput, log) -> None:
    digest = _skip(tables, output)
    if output.rows:
        print_lines(f"continuing after row {output.rows}", file=log)
    device, plan = labeller.evaluator.ranks.device, labeller.evaluator.precision.plan
    begin = last = time.perf_counter()
    rows = 0
    for table in tables:
        columns = labeller.label(table)
        digest = _hash_with(digest, table)
        output.append(table, columns, digest)
        rows += len(table)
        now = time.perf_counter()
        if now - last > _SECONDS_BETWEEN_LINES:
            print_lines(f"{rows} rows, {rows / (now - begin):.1f} rows/s", file=log)
            last = now
    output.finish()
    seconds = time.perf_counter() - begin
    path = "packed" if labeller.model.is_packed else f"padded, {labeller.model.why_padded}"
    print_lines(
        f"labelled {rows} rows in {seconds:.1f} s: {rows / seconds:.1f} rows/s ({path}, {plan.name}, {device.name})",
        file=log,
    )
    for one in (labeller, *labeller.others):
        for line in one.length_notes():
            print_lines(f"note: {line}", file=log)


def _identity(args: Arguments, labeller: Labeller, kind: str) -> dict[str, Any]:
    """The values of `IDENTITY` in predict/output.py."""
    members = (labeller, *labeller.others)
    temperatures = [one.task.decision.temperature for one in members]
    windows = [one.windows and [one.windows.stride, one.windows.most] for one in members]
    return {
        "model_sha256": [found for one in members for found in one.model.file_hashes.values()],
        "tokenizers": [one.model.tokenizer.fingerprint for one in members],
        "text_columns": [name for one in members for name in one.task.columns],
        "max_seq_lengths": [one.limit for one in members],
        **({"windows": windows} if any(windows) else {}),
        "per_device_eval_batch_size": args.per_device_eval_batch_size,
        "precision": labeller.evaluator.precision.plan.name,
        "device": labeller.evaluator.ranks.device.kind,
        "output_format": kind,
        "label_threshold": labeller.threshold,
        **({} if set(temperatures) == {1.0} else {"temperatures": temperatures}),
        "label_delimiter": labeller.delimiter,
    }


def _kind(options: argparse.Namespace, part: str) -> str:
    """The format of the input or output: csv, tsv, jsonl or parquet, by its flag or else by the extension.

    Args:
        part: "input" or "output".

    Raises:
        UsageError: the extension is unknown and no flag is given, or the format cannot be piped.
    """
    path, asked = getattr(options, part), getattr(options, f"{part}_format")
    kind = asked or ("jsonl" if path == STANDARD else path.suffix.lower().removeprefix("."))
    if kind not in STREAMED:
        raise UsageError(f"--{part} {path}: unknown extension. Choices: {', '.join(STREAMED)}, or --{part}_format")
    if path == STANDARD and kind == "parquet":
        raise UsageError(f"--{part} -: parquet cannot be piped; use a file, or --{part}_format jsonl, csv or tsv")
    return kind


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _parser() -> CommandParser:
    parser = CommandParser(
        same={"model_name_or_path": "model", "test_file": "input", "output_dir": "output",
              "per_device_train_batch_size": "per_device_eval_batch_size"},
        prog="python -m bert_glue.predict",
        description=(__doc__ or "").split("\n")[0],
    )  # fmt: skip
    add = parser.add_argument
    add("--model", required=True, nargs="+", action="extend", metavar="NAME",
        help="output folder of a run, a checkpoint, or a hub name; several form an ensemble of their mean")  # fmt: skip
    add("--input", required=True, type=Path, help=f"file to label ({', '.join(STREAMED)}); - is standard input")
    add("--output", required=True, type=Path, help="file to write, in the same formats; - is standard output")
    add("--input_format", choices=STREAMED, help="format of the input; default: by the extension, jsonl for -")
    add("--output_format", choices=STREAMED, help="format of the output; default: by the extension, jsonl for -")
    add("--text_column_names", "--text_columns", nargs="+", action="extend", type=_names, metavar="NAME",
        help="text columns of the input; default: the columns the model was trained on")  # fmt: skip
    add("--label_column_name", metavar="NAME", help="label column of the input, which is copied and not read")
    parser.add_problem_type()
    add("--label_threshold", type=float, metavar="P",
        help="with several labels per row, predict those above this probability; default: the model's own")  # fmt: skip
    add("--label_delimiter", metavar="TEXT",
        help="text between the labels of a row in csv and tsv; default: as in training, else ;")  # fmt: skip
    add("--max_seq_length", type=int, help="tokens per sequence; default: as in training, else 128")
    add("--doc_stride", type=int, metavar="N",
        help="tokens shared by neighbouring windows of a long text; -1: cut it; default: as in training")  # fmt: skip
    add("--max_windows", type=int, metavar="N", help="most windows per row; default: as in training, else 64")
    add("--per_device_eval_batch_size", type=int, default=32, help="rows per forward pass; default 32")
    add("--device", default="auto", help="auto (default), an index, a name, or name:index")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    add("--fp16", action="store_true", help="compute in half precision (autocast)")
    add("--trust_remote_code", action="store_true", help="run the Python code of a hub model")
    add("--keep_formulas", action="store_true",
        help="csv and tsv: put no apostrophe before texts that a spreadsheet would run as a formula")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a finished output, and restart an unfinished one")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command. Exit codes: 0 success, 2 usage, 3 data, 4 model or device, 5 diverged weights, 6 disk."""
    parser = _parser()
    options = parser.parse_args(argv)
    options.text_column_names = [name for names in options.text_column_names or () for name in names]
    least_of = {"max_seq_length": 3, "doc_stride": -1, "max_windows": 1, "per_device_eval_batch_size": 1}
    for name, least in least_of.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value} is not in [{least}, inf)")
    if options.label_threshold is not None and not 0 < options.label_threshold < 1:
        parser.error(f"--label_threshold {options.label_threshold} is not in (0, 1)")
    if options.label_delimiter == "" or "\\" in (options.label_delimiter or ""):
        parser.error(
            f"--label_delimiter {options.label_delimiter!r} must be a text that is not empty and has no backslash"
        )
    if options.bf16 and options.fp16:
        parser.error("--fp16 and --bf16 exclude each other; give one")
    return exit_code_of(lambda: run(options))


if __name__ == "__main__":
    run_program(main)
