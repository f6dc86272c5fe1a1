"""Texts to token ids with the tokenizer that comes with a model, cached by content.

`tokenizer.json` (or BERT's `vocab.txt`) is read by the `tokenizers` library itself; importing
transformers' tokenizer classes costs seconds and is kept for models that ship neither.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bert_glue.data.chunked_encoding import encode_rows, flat_arrays
from bert_glue.data.sources import Split
from bert_glue.errors import MachineError, UsageError, first_line
from bert_glue.storage.files import check_not_lfs_pointer, file_hash, json_object, write_json

_FORMAT = "1"
_MAKING, _ABANDONED_SECONDS = ".making-", 86400.0
_ARRAYS = ("ids", "offsets", "second_at")


@dataclass(frozen=True)
class TokenTable:
    """The token ids of one split, flat.

    Args:
        ids: `[tokens]` int32, the sequences end to end, special tokens included.
        offsets: `[rows + 1]` int64, where each sequence begins; the last entry is `tokens`.
        second_at: `[rows]` int32, where within each sequence token type 1 begins.
    """

    ids: np.ndarray
    offsets: np.ndarray
    second_at: np.ndarray

    def __len__(self) -> int:
        """Rows."""
        return len(self.second_at)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, `[rows]` int64."""
        return np.diff(self.offsets)


class TextTokenizer:
    """A model's tokenizer.

    Args:
        folder: model folder.
        uses_types: False for families whose token types are all 0.

    `id_limit` is the number of rows of the model's embedding, None where it is not known.
    """

    def __init__(self, folder: Path, uses_types: bool = True, trust_remote_code: bool = False):
        self.folder, self.uses_types = folder, uses_types
        self.backend = _backend(folder, trust_remote_code)
        self.backend.no_padding()
        self.id_limit: int | None = None
        self.fingerprint = hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, split: Split, max_length: int) -> TokenTable:
        """Tokenize one split; pairs longer than `max_length` tokens are cut, longest text first.

        Raises:
            UsageError: `max_length` holds no more than the special tokens.
        """
        if self.backend.num_special_tokens_to_add(len(split.texts) == 2) >= max_length:
            raise UsageError(f"--max_seq_length {max_length} leaves no room beside the special tokens")
        with _library_errors(self.folder):
            chunks = [flat_arrays(rows) for rows in encode_rows(self.backend, split.texts, max_length)]
        ids, lengths, second = (np.concatenate(parts) for parts in zip(*(chunks or [flat_arrays([])]), strict=True))
        if not self.uses_types:
            second = lengths.astype(np.int32)
        return self.checked(TokenTable(ids, np.concatenate([[0], np.cumsum(lengths)]), second))

    def checked(self, table: TokenTable) -> TokenTable:
        """The same table, whose ids the model's embedding has.

        Raises:
            MachineError: an id is beyond `id_limit`.
        """
        largest = int(table.ids.max()) if len(table.ids) else 0
        if self.id_limit is not None and largest >= self.id_limit:
            raise MachineError(
                f"the tokenizer in {self.folder} gives token id {largest}, and the model has {self.id_limit} rows of "
                "embeddings (vocab_size): they do not belong together"
            )
        return table

    def save(self, folder: Path) -> None:
        """Write tokenizer.json beside the model's other tokenizer files, copied as they are.

        A folder that came with a bare vocab.txt gets a tokenizer_config.json, from which transformers
        learns what this class guessed: whether to lower-case.
        """
        import shutil

        from tokenizers.models import WordPiece

        for name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab.txt",
            "vocab.json",
            "merges.txt",
        ):
            if (self.folder / name).is_file() and folder.resolve() != self.folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)
        settings = folder / "tokenizer_config.json"
        if not settings.is_file() and isinstance(self.backend.model, WordPiece):
            lower = bool(getattr(self.backend.normalizer, "lowercase", False))
            tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
            entries = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower, **tokens}
            write_json(settings, entries)
        self.backend.no_truncation()
        # Not backend.save: on a full disk that raises a bare Exception.
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")


@contextmanager
def _library_errors(folder: Path) -> Iterator[None]:
    """Turn what the Rust library makes of a broken tokenizer, a bare Exception or a panic, into one line."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise MachineError(f"the tokenizer in {folder} cannot be used: {first_line(error)}") from error


def _backend(folder: Path, trust_remote_code: bool):
    """The Rust tokenizer of a model folder."""
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            check_not_lfs_pointer(folder / name)
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.txt").is_file() and _model_type(folder) in ("bert", "electra", "distilbert"):
            settings = folder / "tokenizer_config.json"
            options = json_object(settings) if settings.is_file() else {}
            # A cased vocabulary without settings is not lower-cased, whatever transformers' default is.
            lower = options.get("do_lower_case", not _has_case(folder))
            return BertWordPieceTokenizer(
                str(folder / "vocab.txt"),
                lowercase=lower,
                strip_accents=options.get("strip_accents"),
                handle_chinese_chars=options.get("tokenize_chinese_chars", True),
            )._tokenizer
    except Exception as error:  # the Rust library raises bare Exception
        raise MachineError(f"the tokenizer in {folder} cannot be read: {error}") from error
    return _transformers_backend(folder, trust_remote_code)


def _model_type(folder: Path) -> str:
    """Of config.json; a --tokenizer_name folder may have none, and vocab.txt is BERT's format."""
    path = folder / "config.json"
    return json_object(path).get("model_type", "") if path.is_file() else "bert"


def _has_case(folder: Path) -> bool:
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return any(word[:1].isascii() and word[:1].isupper() for word in words)


def _transformers_backend(folder: Path, trust_remote_code: bool):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        backend = tokenizer.backend_tokenizer
    except Exception as error:
        raise MachineError(
            f"{folder} has no tokenizer.json and transformers cannot build a fast tokenizer: {error}"
        ) from error
    # Without any vocabulary file transformers 5 gives a tokenizer that knows its special tokens only.
    if backend.get_vocab_size() <= len(tokenizer.all_special_tokens):
        raise MachineError(f"{folder} has no tokenizer.json, nor a vocabulary to build a tokenizer from")
    return backend


def cache_folder() -> Path:
    """Where tokenised splits are kept: $BERT_GLUE_CACHE, else $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("BERT_GLUE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "bert_glue"


def tokenize(
    tokenizer: TextTokenizer, split: Split, max_length: int, refresh: bool = False, threads: int | None = None
) -> tuple[TokenTable, str]:
    """The tokens of a split, from the cache where the same texts were tokenized the same way before.

    Args:
        refresh: tokenize again although the cache fits.
        threads: of the tokenizer; None for one a core. Counts for the first call of a process.

    Returns:
        The table, memory-mapped where it comes from the cache, and how it was had: "cached", "made", or
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
    digest = hashlib.sha256(
        f"{_FORMAT}|{tokenizer.fingerprint}|{tokenizer.uses_types}|{max_length}|{len(split)}".encode()
    )
    for column in split.texts:
        # Lengths first: without them two columns could trade characters and keep the hash.
        digest.update(np.fromiter(map(len, column), np.int64, len(column)).tobytes())
        digest.update("".join(column).encode("utf-8", "surrogatepass"))
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
