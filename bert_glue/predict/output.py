"""Writes labelled rows as csv, tsv, jsonl or parquet, chunk by chunk, so that a killed run can continue.

An unfinished file is called `.<name>.partial`. Beside it, `.<name>.progress.json` states how many of its rows and
bytes are valid. After a kill, the bytes beyond are cut off and their rows are written again. The finished file is
byte for byte the same as that of a run that was never stopped.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from bert_glue.data.tables import Table
from bert_glue.errors import CheckpointError, DataError
from bert_glue.storage.files import (
    json_object,
    open_own,
    plain_errors,
    without_formula,
    write_json,
    written_aside,
)
from bert_glue.storage.identity import Fact, differences, flag_facts, with_current_keys

Columns = dict[str, list]
# Everything that decides the bytes of the output.
IDENTITY = (
    Fact("model_sha256", "model"),
    Fact("tokenizers", "tokenizer"),
    *flag_facts(("text_columns",)),
    Fact("max_seq_lengths", "--max_seq_length"),
    Fact("windows", "--doc_stride or --max_windows"),
    *flag_facts(("per_device_eval_batch_size",)),
    Fact("precision", "precision"),
    Fact("device", "device"),
    *flag_facts(("output_format", "label_threshold", "label_delimiter", "keep_formulas")),
    Fact("temperatures", "temperatures of the models (--calibrate)"),
)


class ToStandardOutput:
    """Writes rows to standard output. It keeps no progress, so a killed run starts again.

    Args:
        kind: csv, tsv or jsonl.
        keep_formulas: see `without_formula`.
    """

    rows, input_hash = 0, ""

    def __init__(self, kind: str, keep_formulas: bool = False):
        self.encode = _ENCODERS[kind]()
        self.encode.keeps_formulas = keep_formulas

    def append(self, table: Table, columns: Columns, input_hash: str) -> None:
        """Writes one chunk."""
        try:
            sys.stdout.buffer.write(self.encode(table, columns))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            # The pipe has no reader. At exit Python flushes stdout again, which would print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise CheckpointError("--output -: the reader of standard output has ended") from None

    def finish(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class ToFile:
    """Writes rows to a file that gets its name when it is complete.

    Args:
        kind: csv, tsv, jsonl or parquet.
        identity: the values of `IDENTITY`. An unfinished file with other values is refused.
        overwrite: replace a finished file, and restart an unfinished one.
        keep_formulas: see `without_formula`.

    Raises:
        CheckpointError: the file exists, another process is writing it, or an unfinished file does not match.
    """

    def __init__(
        self, path: Path, kind: str, identity: dict[str, Any], *, overwrite: bool, keep_formulas: bool = False
    ):
        self.path, self.kind, self.identity = path, kind, identity
        self.encode = _ENCODERS[kind]()
        self.encode.keeps_formulas = keep_formulas
        self._partial = path.with_name(f".{path.name}.partial")
        self._progress = path.with_name(f".{path.name}.progress.json")
        self.rows, self.input_hash = 0, ""
        if path.exists() and not overwrite:
            raise CheckpointError(f"--output {path} exists; choose another path, or give --overwrite")
        with plain_errors(path):
            self._file: BinaryIO = open_own(self._partial)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"--output {path}: another process is writing it") from None
        size = 0 if overwrite else self._resume()
        self._file.truncate(size)
        self._bytes = size

    def _resume(self) -> int:
        """Continues from the progress file of an earlier process, and returns the number of valid bytes."""
        try:
            earlier = json_object(self._progress)
            _check_progress(earlier)
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._progress} is damaged ({error}); --overwrite starts from the beginning"
            ) from None
        other = differences(IDENTITY, with_current_keys(IDENTITY, earlier["identity"]), self.identity)
        if other:
            raise CheckpointError(
                f"--output {self.path}: {earlier['rows']} rows were labelled with another {other}; "
                "continue with the same settings, or start from the beginning with --overwrite"
            )
        if self._partial.stat().st_size < earlier["bytes"]:
            raise CheckpointError(
                f"{self._partial} is shorter than {self._progress.name} states; --overwrite starts from the beginning"
            )
        self.rows, self.input_hash = earlier["rows"], earlier["input_sha256"]
        self.encode.go_on(earlier["columns"], self._partial)
        return earlier["bytes"]

    def append(self, table: Table, columns: Columns, input_hash: str) -> None:
        """Adds one chunk. After this returns, the chunk survives a kill.

        Args:
            input_hash: the hash of all input rows so far.
        """
        content = self.encode(table, columns)
        with plain_errors(self.path):
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.rows += len(table)
            self._bytes += len(content)
            progress = {"rows": self.rows, "bytes": self._bytes, "input_sha256": input_hash}
            write_json(self._progress, {**progress, "columns": self.encode.names, "identity": self.identity})

    def finish(self) -> None:
        """Renames the complete file to its final name."""
        with plain_errors(self.path):
            if self.kind == "parquet":
                with written_aside(self.path) as aside:
                    _to_parquet(self._partial, aside)
            else:
                os.replace(self._partial, self.path)
            for part in (self._partial, self._progress):
                part.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file, and deletes it if it has no valid rows."""
        if not self.rows:
            self._partial.unlink(missing_ok=True)
        self._file.close()


def _check_progress(progress: dict[str, Any]) -> None:
    """Raises ValueError unless `progress` has the fields that `ToFile.append` writes."""
    kinds = {"rows": int, "bytes": int, "input_sha256": str, "columns": list, "identity": dict}
    for name, kind in kinds.items():
        value = progress.get(name)
        is_count = kind is not int or (not isinstance(value, bool) and isinstance(value, int) and value >= 0)
        if not isinstance(value, kind) or not is_count:
            raise ValueError(f"its {name!r} is {str(value)[:40]}")
    if not all(isinstance(name, str) for name in progress["columns"]):
        raise ValueError("its 'columns' are not names")


class _Encoder:
    """Converts chunks of columns to bytes.

    Args:
        names: the columns of the first chunk, which all later chunks must have. None before the first chunk.
        keeps_formulas: False puts an apostrophe before formulas in csv and tsv.
    """

    keeps_formulas = False

    def __init__(self) -> None:
        self.names: list[str] | None = None

    def go_on(self, names: list[str], partial: Path) -> None:
        """Continues from the earlier process that wrote `partial`."""
        self.names = names

    def __call__(self, table: Table, columns: Columns) -> bytes:
        """The bytes of one chunk.

        Raises:
            DataError: the format cannot hold a value or column (file:line).
        """
        is_first = self.names is None
        self.names = self.names or list(columns)
        for name in columns.keys() - set(self.names):
            at = next((row for row, value in enumerate(columns[name]) if value is not None), 0)
            raise DataError(
                f"{table.where(at)}: the first rows have no column {name!r}; write jsonl, which can hold it"
            )
        return self.encode(table, {name: columns.get(name, [None] * len(table)) for name in self.names}, is_first)

    def encode(self, table: Table, columns: Columns, is_first: bool) -> bytes:
        """The bytes of columns that are the same in all chunks."""
        raise NotImplementedError

    def cells(self, columns: Columns) -> tuple[list[str], list[list[str]]]:
        """Names and texts of the columns, as written in csv and tsv."""
        names, texts = list(columns), _texts(columns)
        if self.keeps_formulas:
            return names, texts
        return [without_formula(name) for name in names], [[without_formula(text) for text in own] for own in texts]


class _Csv(_Encoder):
    def encode(self, table: Table, columns: Columns, is_first: bool) -> bytes:
        names, texts = self.cells(columns)
        # csv.writer does not quote a single CR, and readers take it for the end of a line.
        has_return = any("\r" in value for values in texts for value in values)
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL)
        if is_first:
            writer.writerow(names)
        writer.writerows(zip(*texts, strict=True))
        return _utf8(table, text.getvalue())


class _Tsv(_Encoder):
    def encode(self, table: Table, columns: Columns, is_first: bool) -> bytes:
        names, texts = self.cells(columns)
        lines = ["\t".join(names)] if is_first else []
        for row, values in enumerate(zip(*texts, strict=True)):
            line = "\t".join(values)
            if line.count("\t") != len(values) - 1 or "\n" in line or "\r" in line:
                raise DataError(f"{table.where(row)}: a text has a tab or line break, which tsv cannot hold; write csv")
            lines.append(line)
        return _utf8(table, "\n".join(lines) + "\n")


class _Jsonl(_Encoder):
    def __call__(self, table: Table, columns: Columns) -> bytes:
        """One object per row. Chunks may have different keys."""
        self.names = []
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return _utf8(table, "".join(_json(row) + "\n" for row in rows))


def _json(value: Any) -> str:
    if isinstance(value, dict):  # JSON has no NaN
        value = {name: None if isinstance(v, float) and v != v else v for name, v in value.items()}
    return json.dumps(value, ensure_ascii=False, default=str)


def _texts(columns: Columns) -> list[list[str]]:
    """Values as written in csv and tsv: None is empty, lists and objects are JSON."""

    def text(value: Any) -> str:
        if value is None:
            return ""
        return value if isinstance(value, str) else _json(value)

    return [[text(value) for value in values] for values in columns.values()]


def _utf8(table: Table, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{table.where(0)} or later: a text has half a surrogate pair, which UTF-8 cannot hold"
        ) from None


class _Parquet(_Encoder):
    """Writes an Arrow stream, to which chunks can be appended, unlike to parquet. `_to_parquet` converts it."""

    _schema: Any = None

    def go_on(self, names: list[str], partial: Path) -> None:
        import pyarrow

        super().go_on(names, partial)
        with pyarrow.OSFile(str(partial)) as file:
            self._schema = pyarrow.ipc.open_stream(file).schema

    def encode(self, table: Table, columns: Columns, is_first: bool) -> bytes:
        import pyarrow

        content = b""
        if self._schema is None:
            first = [_array(table, name, values, None) for name, values in columns.items()]
            kinds = [_known_kind(array.type) for array in first]
            self._schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
            content = self._schema.serialize().to_pybytes()
        arrays = [_array(table, name, columns[name], self._schema.field(name).type) for name in columns]
        return content + pyarrow.record_batch(arrays, schema=self._schema).serialize().to_pybytes()


def _known_kind(kind: Any) -> Any:
    """The type of a column. A column (or list) without any value in the first rows is text: later rows may have one."""
    import pyarrow

    if pyarrow.types.is_list(kind) and pyarrow.types.is_null(kind.value_type):
        return pyarrow.list_(pyarrow.string())
    return pyarrow.string() if pyarrow.types.is_null(kind) else kind


def _array(table: Table, name: str, values: list, kind: Any) -> Any:
    """A column as an Arrow array. If `kind` is None, Arrow infers the type."""
    import pyarrow

    problems = (pyarrow.ArrowException, UnicodeEncodeError, OverflowError)
    try:
        return pyarrow.array(values, kind)
    except problems:
        for row in range(len(values)):
            try:
                pyarrow.array(values[: row + 1] if kind is None else [values[row]], kind)
            except problems:
                found = f"{str(values[row])[:40]!r}, which does not fit the type of the rows before"
                raise DataError(f"{table.where(row)}: {name!r} is {found}; write jsonl, which can hold it") from None
        raise


def _to_parquet(stream: Path, target: Path) -> None:
    """Converts an Arrow stream to a parquet file with one row group per chunk."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.OSFile(str(stream)) as file:
        reader = pyarrow.ipc.open_stream(file)
        with pyarrow.parquet.ParquetWriter(target, reader.schema) as writer:
            for batch in reader:
                writer.write_batch(batch)


_ENCODERS: dict[str, Callable[[], _Encoder]] = {"csv": _Csv, "tsv": _Tsv, "jsonl": _Jsonl, "parquet": _Parquet}
