"""Converts texts to token ids with the tokenizer of a model, and caches them by content."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from bert_glue import result_keys as keys
from bert_glue.data.auto_tokenizer import library_errors, load_tokenizer
from bert_glue.data.chunked_encoding import (
    EncodedRow,
    Windows,
    WindowTooSmallError,
    encode_in_python,
    encode_rows,
    encode_windows,
    flat_arrays,
)
from bert_glue.data.sources import Split
from bert_glue.data.tables import pieces
from bert_glue.errors import DataError, MachineError, UsageError
from bert_glue.storage.files import cache_folder, file_hash, is_inside, json_object, write_json
from bert_glue.storage.lock import one_at_a_time

_FORMAT = "3"
# Classes of transformers that read any tokenizer.json; its version 4 has other names for them.
_GENERIC = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "PreTrainedTokenizerFast")
_MAKING, _ABANDONED_SECONDS = ".making-", 86400.0
_ARRAYS = ("ids", "offsets", "types", "first")
# Beside the files that a tokenizer's class names.
_SETTINGS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True)
class TokenTable:
    """The token ids of one split, flat.

    Args:
        ids: `[tokens]` int32, the sequences end to end, special tokens included.
        offsets: `[sequences + 1]` int64, where each sequence begins; the last entry is `tokens`.
        types: `[tokens]` int8, the token type of each; 0 where the tokenizer gives none.
        first: `[rows + 1]` int64, the first sequence (window) of each row. None if each row is one sequence.
        cut_rows: rows that have text beyond their tokens.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray
    first: np.ndarray | None = None
    cut_rows: int = 0

    def __len__(self) -> int:
        """Rows."""
        return len(self.offsets if self.first is None else self.first) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, those of all its windows, `[rows]` int64."""
        return np.diff(self.offsets if self.first is None else self.offsets[self.first])

    @property
    def windows(self) -> int:
        """Sequences."""
        return len(self.offsets) - 1

    @property
    def windowed_rows(self) -> int:
        """Rows of more than one sequence."""
        return 0 if self.first is None else int((np.diff(self.first) > 1).sum())

    @property
    def row_counts(self) -> dict[str, int]:
        """Figures of `result_keys`: rows that are cut, and where rows may have several windows how many do."""
        cut = {keys.CUT_ROWS: self.cut_rows} if self.cut_rows else {}
        if self.first is None:
            return cut
        return {keys.WINDOWS: self.windows, keys.WINDOWED_ROWS: self.windowed_rows, **cut}

    @property
    def sequences(self) -> TokenTable:
        """The same with a row for each sequence."""
        return replace(self, first=None)

    def ids_of(self, row: int) -> np.ndarray:
        """The token ids of a row, one window after the other, `[tokens]` int32."""
        begin, end = row, row + 1
        if self.first is not None:
            begin, end = self.first[row], self.first[row + 1]
        return self.ids[self.offsets[begin] : self.offsets[end]]

    def row_means(self, values: np.ndarray) -> np.ndarray:
        """`[sequences, width]` float32 -> `[rows, width]` float32: the mean over each row's sequences."""
        if self.first is None:
            return values
        sums = np.add.reduceat(values.astype(np.float64), self.first[:-1], axis=0)
        return (sums / np.diff(self.first)[:, None]).astype(np.float32)


class TextTokenizer:
    """A model's tokenizer, as transformers reads it from the model's folder.

    Args:
        folder: model folder.
        config: the model's config.json; None to read it from `folder`.
        word_rows, type_rows: rows of the model's word and token type embeddings. None if it has none.
    """

    def __init__(
        self,
        folder: Path,
        config: dict | None = None,
        trust_remote_code: bool = False,
        *,
        word_rows: int | None = None,
        type_rows: int | None = None,
    ):
        self.folder, self.word_rows, self.type_rows = folder, word_rows, type_rows
        self.stock, self._chosen = load_tokenizer(folder, config, trust_remote_code)
        self.backend = self.stock.backend_tokenizer if self.stock.is_fast else None
        if self.backend is not None:
            self.backend.no_padding()
            self.backend.no_truncation()
        self.input_names = frozenset(self.stock("a"))
        self.gives_types = "token_type_ids" in self.input_names
        self.pads_left = self.stock.padding_side == "left"
        self.fingerprint = hashlib.sha256(self._description().encode()).hexdigest()

    def _description(self) -> str:
        """Everything that determines the tokens of a text; a part of the cache's key."""
        rules = f"{self.gives_types}|{self.stock.truncation_side}|"
        if self.backend is not None:
            return rules + self.backend.to_str()
        from transformers import __version__

        hashes = [file_hash(self.folder / name) for name in self._files()]
        return f"{rules}{type(self.stock).__name__}|{__version__}|{hashes}|{sorted(self._chosen.items())}"

    @property
    def pad_id(self) -> int | None:
        """The token id of padding. None if the vocabulary has none."""
        return self.stock.pad_token_id

    @property
    def notes(self) -> list[str]:
        """Lines for the log: what was chosen otherwise than transformers would choose."""
        if not self._chosen:
            return []
        seen = "no capitals: words are made lower-case" if self._chosen["do_lower_case"] else "capitals: they are kept"
        return [
            f"{self.folder}: no file says whether words are made lower-case, and versions of transformers differ. The "
            f'vocabulary has {seen}. "do_lower_case" in tokenizer_config.json decides'
        ]

    @cached_property
    def size(self) -> int:
        """Rows that a word table needs for the ids of this vocabulary."""
        return max(self.stock.get_vocab().values()) + 1

    def words(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's words of token ids; "?" where an id is none."""
        return [word or "?" for word in self.stock.convert_ids_to_tokens(list(map(int, ids)))]

    def encode(self, split: Split, max_length: int, windows: Windows | None = None) -> TokenTable:
        """Tokenize one split; rows longer than `max_length` tokens are cut; in a pair the longer text first.

        Args:
            windows: how longer rows become several sequences instead.

        Raises:
            UsageError: `max_length` has no space beside the special tokens, or a window none beside the stride.
            DataError: one row, a pair of two long texts, has no space for windows.
            MachineError: a token id or type is not in the model's tables, or the library fails.
        """
        if self.stock.num_special_tokens_to_add(len(split.texts) == 2) >= max_length:
            raise UsageError(f"--max_seq_length {max_length} leaves no room for text beside the special tokens")
        chunks, counts, cut_rows = [], [0], 0
        with library_errors(self.folder):
            for rows in self._encoded(split, max_length, windows):
                counts += map(len, rows)
                cut_rows += sum(row[0].is_cut for row in rows)
                chunks.append(flat_arrays(list(chain(*rows))))
        ids, lengths, types = (np.concatenate(parts) for parts in zip(*(chunks or [flat_arrays([])]), strict=True))
        if not self.gives_types:
            types[:] = 0
        first = None if windows is None else np.cumsum(counts)
        return self.checked(TokenTable(ids, np.concatenate([[0], np.cumsum(lengths)]), types, first, cut_rows))

    def _encoded(self, split: Split, max_length: int, windows: Windows | None) -> Iterator[list[list[EncodedRow]]]:
        """Chunks of rows, each as its sequences."""
        if windows is not None:
            try:
                yield from encode_windows(self.stock, split.texts, max_length, windows)
            except WindowTooSmallError as error:
                raise _window_too_small(error, split, max_length, windows.stride) from None
            return
        if self.backend is None:
            encoded = encode_in_python(self.stock, split.texts, max_length)
        else:
            encoded = encode_rows(self.backend, split.texts, max_length, self.stock.truncation_side == "left")
        for rows in encoded:
            yield [[row] for row in rows]

    def checked(self, table: TokenTable) -> TokenTable:
        """The same table, whose ids and token types the model's tables have.

        Raises:
            MachineError: one of them is beyond `word_rows` or `type_rows`.
        """
        limits = {"token id": (table.ids, self.word_rows), "token type": (table.types, self.type_rows)}
        for kind, (found, rows) in limits.items():
            if rows is not None and found.max(initial=0) >= rows:
                raise MachineError(
                    f"the tokenizer in {self.folder} gives {kind} {found.max()}, but the model has only {rows} rows of "
                    "embeddings for it; use the tokenizer of this model"
                )
        return table

    def _files(self) -> list[str]:
        """Names of the files in `folder` that a tokenizer of this class is read from."""
        names = {*_SETTINGS, *self.stock.vocab_files_names.values()}
        return sorted(name for name in names if (self.folder / name).is_file())

    def check_files(self) -> None:
        """Refuse links that lead out of the folder: `save` would copy what they name into a model that is given away.

        Raises:
            MachineError: a file is such a link.
        """
        for name in self._files():
            file = self.folder / name
            if not is_inside(file, self.folder):
                raise MachineError(
                    f"{file} is a link to {file.resolve()}, out of the model's folder: it would be copied into the "
                    f"trained model; if it belongs to the model, give a copy without links: "
                    f"cp -rL {shlex.quote(str(self.folder))} NEW"
                )

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files as they are, so that transformers makes the same tokenizer of them.

        What they do not say is added to tokenizer_config.json: the class, and the choices of `notes`. A folder
        without tokenizer.json gets one, for programs that read nothing else; but not beside a sentencepiece
        vocabulary, of which transformers makes another tokenizer than of that file.

        Raises:
            MachineError: as `check_files`.
        """
        self.check_files()
        names = self._files()
        if folder.resolve() != self.folder.resolve():
            for name in names:
                shutil.copyfile(self.folder / name, folder / name)
        path = folder / "tokenizer_config.json"
        found = json_object(path) if path.is_file() else {}
        settings = {**self._implied(), **found, **self._chosen}
        if settings != found:
            write_json(path, settings)
        if self.backend is not None and not any(name.endswith((".model", "tokenizer.json")) for name in names):
            # Not backend.save: on a full disk that raises a bare Exception.
            (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    def _implied(self) -> dict[str, Any]:
        """Notes on choices of transformers that no file of the folder states."""
        name, lower = type(self.stock).__name__, getattr(self.stock, "do_lower_case", None)
        implied = {} if name in _GENERIC else {"tokenizer_class": name}
        return implied if lower is None else {**implied, "do_lower_case": lower}


def _window_too_small(error: WindowTooSmallError, split: Split, max_length: int, stride: int) -> UsageError | DataError:
    """The error for a window that is too small for the stride."""
    if error.row is None:
        return UsageError(
            f"--doc_stride {stride}: a window of {max_length} tokens (--max_seq_length) has room for {error.capacity} "
            f"tokens of text; give less than {error.capacity}"
        )
    lower = f"give a --doc_stride below {error.capacity}, or " if error.capacity else ""
    return DataError(
        f"{split.origin}: row {error.row + 1}: --doc_stride {stride}: beside the shorter of its two texts a window of "
        f"{max_length} tokens (--max_seq_length) has room for {error.capacity}; {lower}give a longer --max_seq_length"
    )


def tokenize(
    tokenizer: TextTokenizer,
    split: Split,
    max_length: int,
    *,
    windows: Windows | None = None,
    refresh: bool = False,
    threads: int | None = None,
) -> tuple[TokenTable, str]:
    """The tokens of a split, from the cache where the same texts were tokenized the same way before.

    Args:
        windows: as `TextTokenizer.encode`.
        refresh: tokenize again although the cache fits.
        threads: of the tokenizer; None for one a core. Counts for the first call of a process.

    Returns:
        The table (memory-mapped if it comes from the cache), and its origin: "cached", "made", or
        "made (not cached: reason)".
    """
    key = _key(tokenizer, split, max_length, windows)
    folder = cache_folder() / "tokens" / key
    table = None if refresh else _read(folder)
    if table is not None:
        return tokenizer.checked(table), "cached"
    # The seeds of a sweep start together and want the same tokens: one makes them, the others wait and read.
    with one_at_a_time(cache_folder() / "locks" / key[:2]):
        table = None if refresh else _read(folder)
        if table is not None:
            return tokenizer.checked(table), "cached"
        if threads is not None:
            os.environ["RAYON_NUM_THREADS"] = str(threads)
        table = tokenizer.encode(split, max_length, windows)
        try:
            _write(folder, table)
        except OSError as error:
            return table, f"made (not cached: {error.strerror or error})"
        return table, "made"


def _key(tokenizer: TextTokenizer, split: Split, max_length: int, windows: Windows | None) -> str:
    digest = hashlib.sha256(f"{_FORMAT}|{tokenizer.fingerprint}|{max_length}|{windows}|{len(split)}".encode())
    for column in split.texts:
        # The lengths come first; without them two columns could exchange characters and keep the hash.
        digest.update(np.fromiter(map(len, column), np.int64, len(column)).tobytes())
        for part in pieces(column):
            digest.update("".join(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:40]


def _read(folder: Path) -> TokenTable | None:
    """A cached table; None if it is absent or has changed since it was written."""
    try:
        manifest = json_object(folder / "manifest.json")
        cut_rows, hashes = int(manifest.pop("cut_rows")), manifest
        arrays = {}
        for name in (name for name in _ARRAYS if name in hashes or name != "first"):
            if file_hash(folder / f"{name}.npy", "blake2b") != hashes[name]:
                return None
            # Not np.load, which also opens zip archives.
            arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", mode="r")
        return TokenTable(**arrays, cut_rows=cut_rows)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, table: TokenTable) -> None:
    """Publish a table in one rename, so that no other job ever reads half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_MAKING) as making:
        inside = Path(making) / "table"
        inside.mkdir()
        arrays = {name: getattr(table, name) for name in _ARRAYS}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        for name, array in arrays.items():
            np.save(inside / f"{name}.npy", array)
        hashes = {name: file_hash(inside / f"{name}.npy", "blake2b") for name in arrays}
        write_json(inside / "manifest.json", {**hashes, "cut_rows": table.cut_rows})
        with suppress(FileNotFoundError):
            folder.rename(Path(making) / "stale")
        try:
            inside.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another job was a moment faster
                raise


def _remove_abandoned(tables: Path) -> None:
    """Delete the temporary files of killed jobs after a day; a running job finishes within minutes."""
    for making in tables.glob(f"{_MAKING}*"):
        with suppress(OSError):
            if time.time() - making.stat().st_mtime > _ABANDONED_SECONDS:
                for file in [*making.glob("*/*.npy"), *making.glob("*/manifest.json")]:
                    file.unlink()
                for folder in [*making.iterdir(), making]:
                    folder.rmdir()
