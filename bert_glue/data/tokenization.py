"""Texts to token ids with the tokenizer that comes with a model, cached by content."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bert_glue.data.auto_tokenizer import library_errors, load_tokenizer
from bert_glue.data.chunked_encoding import encode_in_python, encode_rows, flat_arrays
from bert_glue.data.sources import Split
from bert_glue.data.tables import pieces
from bert_glue.errors import MachineError, UsageError
from bert_glue.storage.files import cache_folder, file_hash, json_object, write_json

_FORMAT = "2"
# Classes of transformers that read any tokenizer.json; its version 4 has other names for them.
_GENERIC = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "PreTrainedTokenizerFast")
_MAKING, _ABANDONED_SECONDS = ".making-", 86400.0
_ARRAYS = ("ids", "offsets", "types")
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
        offsets: `[rows + 1]` int64, where each sequence begins; the last entry is `tokens`.
        types: `[tokens]` int8, the token type of each; 0 where the tokenizer gives none.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray

    def __len__(self) -> int:
        """Rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, `[rows]` int64."""
        return np.diff(self.offsets)


class TextTokenizer:
    """A model's tokenizer, as transformers reads it from the model's folder.

    Args:
        folder: model folder.
        config: the model's config.json; None to read it from `folder`.
        word_rows, type_rows: rows of the model's tables of words and of token types; None where it has none.
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
        """All that decides what a text becomes."""
        rules = f"{self.gives_types}|{self.stock.truncation_side}|"
        if self.backend is not None:
            return rules + self.backend.to_str()
        from transformers import __version__

        hashes = [file_hash(self.folder / name) for name in self._files() if (self.folder / name).is_file()]
        return f"{rules}{type(self.stock).__name__}|{__version__}|{hashes}|{sorted(self._chosen)}"

    @property
    def pad_id(self) -> int | None:
        """Token id of padding; None where the vocabulary has none."""
        return self.stock.pad_token_id

    @property
    def notes(self) -> list[str]:
        """Lines for the log: what was chosen otherwise than transformers would choose."""
        if not self._chosen:
            return []
        return [
            f"{self.folder}: no file says whether words are made lower-case, and the vocabulary has capitals: they are "
            'kept, where transformers would lower-case; "do_lower_case" in tokenizer_config.json decides'
        ]

    @cached_property
    def size(self) -> int:
        """Rows that a word table needs for the ids of this vocabulary."""
        return max(self.stock.get_vocab().values()) + 1

    def words(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's words of token ids; "?" where an id is none."""
        return [word or "?" for word in self.stock.convert_ids_to_tokens(list(map(int, ids)))]

    def encode(self, split: Split, max_length: int) -> TokenTable:
        """Tokenize one split; pairs longer than `max_length` tokens are cut, longest text first.

        Raises:
            UsageError: `max_length` holds no more than the special tokens.
            MachineError: a token id or type is not in the model's tables, or the library fails.
        """
        if self.stock.num_special_tokens_to_add(len(split.texts) == 2) >= max_length:
            raise UsageError(f"--max_seq_length {max_length} leaves no room beside the special tokens")
        if self.backend is None:
            encoded = encode_in_python(self.stock, split.texts, max_length)
        else:
            encoded = encode_rows(self.backend, split.texts, max_length, self.stock.truncation_side == "left")
        with library_errors(self.folder):
            chunks = [flat_arrays(rows) for rows in encoded]
        ids, lengths, types = (np.concatenate(parts) for parts in zip(*(chunks or [flat_arrays([])]), strict=True))
        if not self.gives_types:
            types[:] = 0
        return self.checked(TokenTable(ids, np.concatenate([[0], np.cumsum(lengths)]), types))

    def checked(self, table: TokenTable) -> TokenTable:
        """The same table, whose ids and token types the model's tables have.

        Raises:
            MachineError: one of them is beyond `word_rows` or `type_rows`.
        """
        limits = {"token id": (table.ids, self.word_rows), "token type": (table.types, self.type_rows)}
        for kind, (found, rows) in limits.items():
            if rows is not None and found.max(initial=0) >= rows:
                raise MachineError(
                    f"the tokenizer in {self.folder} gives {kind} {found.max()}, and the model has {rows} rows of "
                    "embeddings for it: they do not belong together"
                )
        return table

    def _files(self) -> list[str]:
        """Names of the files that a tokenizer of this class is read from."""
        return sorted({*_SETTINGS, *self.stock.vocab_files_names.values()})

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files as they are, so that transformers makes the same tokenizer of them.

        What they do not say is added to tokenizer_config.json: the class, and the choices of `notes`. A folder
        without tokenizer.json gets one, for programs that read nothing else; but not beside a sentencepiece
        vocabulary, of which transformers makes another tokenizer than of that file.
        """
        names = [name for name in self._files() if (self.folder / name).is_file()]
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
        """What transformers took for granted where no file says it."""
        name, lower = type(self.stock).__name__, getattr(self.stock, "do_lower_case", None)
        implied = {} if name in _GENERIC else {"tokenizer_class": name}
        return implied if lower is None else {**implied, "do_lower_case": lower}


def tokenize(
    tokenizer: TextTokenizer, split: Split, max_length: int, refresh: bool = False, threads: int | None = None
) -> tuple[TokenTable, str]:
    """The tokens of a split, from the cache where the same texts were tokenized the same way before.

    Args:
        refresh: tokenize again although the cache fits.
        threads: of the tokenizer; None for one a core. Counts for the first call of a process.

    Returns:
        The table, memory-mapped where it comes from the cache, and its origin: "cached", "made", or
        "made (not cached: reason)".
    """
    folder = cache_folder() / "tokens" / _key(tokenizer, split, max_length)
    if not refresh and (table := _read(folder)) is not None:
        return tokenizer.checked(table), "cached"
    if threads is not None:
        os.environ["RAYON_NUM_THREADS"] = str(threads)
    table = tokenizer.encode(split, max_length)
    try:
        _write(folder, table)
    except OSError as error:
        return table, f"made (not cached: {error.strerror or error})"
    return table, "made"


def _key(tokenizer: TextTokenizer, split: Split, max_length: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT}|{tokenizer.fingerprint}|{max_length}|{len(split)}".encode())
    for column in split.texts:
        # Lengths first: without them two columns could trade characters and keep the hash.
        digest.update(np.fromiter(map(len, column), np.int64, len(column)).tobytes())
        for part in pieces(column):
            digest.update("".join(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:40]


def _read(folder: Path) -> TokenTable | None:
    """A cached table, or None where it is absent or not what was written."""
    try:
        manifest = json_object(folder / "manifest.json")
        for name in _ARRAYS:
            if file_hash(folder / f"{name}.npy", "blake2b") != manifest[name]:
                return None
        # Not np.load, which also opens zip archives.
        return TokenTable(*(np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in _ARRAYS))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, table: TokenTable) -> None:
    """Publish a table in one rename, so that no other job ever reads half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_MAKING) as making:
        inside = Path(making) / "table"
        inside.mkdir()
        for name in _ARRAYS:
            np.save(inside / f"{name}.npy", getattr(table, name))
        manifest = {name: file_hash(inside / f"{name}.npy", "blake2b") for name in _ARRAYS}
        write_json(inside / "manifest.json", manifest)
        with suppress(FileNotFoundError):
            folder.rename(Path(making) / "stale")
        try:
            inside.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another job was a moment faster
                raise


def _remove_abandoned(tables: Path) -> None:
    """Delete what killed jobs left a day ago and more; a job at work is done in minutes."""
    for making in tables.glob(f"{_MAKING}*"):
        with suppress(OSError):
            if time.time() - making.stat().st_mtime > _ABANDONED_SECONDS:
                for file in [*making.glob("*/*.npy"), *making.glob("*/manifest.json")]:
                    file.unlink()
                for folder in [*making.iterdir(), making]:
                    folder.rmdir()
