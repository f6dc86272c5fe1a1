"""Tokenizes rows in chunks and cuts long texts first, so that memory and time grow with the text alone.

The tokenizers library keeps about a hundred bytes a character for all rows until the last one is done. It also keeps
what it cuts off: for pairs, each rest of one text with each rest of the other. This module reads a text only as far as
its tokens are needed, and inserts the special tokens by the library's own template. With `--doc_stride` a longer row is
not cut but becomes several sequences, its windows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bert_glue.config.arguments import Arguments

_CHUNK_CHARACTERS = 1 << 18  # about 30 MB inside the library
_CHARACTERS_PER_TOKEN = 8  # of the first reading; English has four to five
_PIECE = 1 << 16  # characters counted at a time
_FAR = 4096  # tokens behind the cut after which the end of a reading has no influence
# WordPiece makes one unknown token of a word this long, and nothing of white space.
_LONG_RUN = re.compile(r"([A-Za-z0-9]{20000})[A-Za-z0-9]+|(\s{20000})\s+")


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row, or of one window of it, and the token type of each.

    Args:
        is_cut: the row has text that is not read.
    """

    ids: list[int]
    types: list[int]
    is_cut: bool = False


@dataclass(frozen=True)
class Windows:
    """How a row that is longer than a sequence becomes several.

    Args:
        stride: tokens that a window shares with the one before it.
        most: windows of one row; what lies behind them is not read.
    """

    stride: int
    most: int

    @classmethod
    def of(cls, args: Arguments) -> Windows | None:
        """The windows that the flags request. None: longer rows are cut."""
        if args.doc_stride is None or args.doc_stride < 0:
            return None
        return cls(args.doc_stride, args.max_windows)


def cut_note(rows: str, max_length: int, windows: Windows | None) -> str:
    """A line on rows that have text beyond their tokens, with the flag that changes it.

    Args:
        rows: subject and verb, such as "3 rows were".
        max_length: tokens of a sequence.
    """
    if windows is not None:
        return f"{rows} truncated after {windows.most} windows (--max_windows)"
    return (
        f"{rows} truncated to {max_length} tokens (--max_seq_length); --doc_stride N reads them whole, in overlapping "
        "windows"
    )


class WindowTooSmallError(Exception):
    """A window holds `stride` tokens of text or fewer, so that the next one would not advance.

    Args:
        row: 0-based. None if no row has space for windows.
        capacity: the number of text tokens in a window.
    """

    def __init__(self, row: int | None, capacity: int):
        super().__init__(row, capacity)
        self.row, self.capacity = row, capacity


@dataclass(frozen=True)
class _Part:
    """A run of the template: special tokens, or the place of text number `text`."""

    ids: tuple[int, ...]
    text: int | None
    type_id: int


def encode_rows(
    backend: Any, columns: Sequence[Sequence[str]], max_length: int, keeps_end: bool = False
) -> Iterator[list[EncodedRow]]:
    """Chunks of encoded rows, cut to `max_length` tokens as the library cuts: the longest text first.

    Args:
        backend: a `tokenizers.Tokenizer`; its truncation is switched off.
        columns: one or two columns of texts, `[rows]` each.
        max_length: tokens of a row, special ones included; more than those.
        keeps_end: the beginning of a text is cut off, not its end.
    """
    if keeps_end:
        yield from _encode_ends(backend, columns, max_length)
        return
    backend.no_truncation()
    template = _template(backend, len(columns))
    budget = max_length - sum(len(part.ids) for part in template)
    for first, last in _chunks(columns, budget):
        encoded = [_beginnings(backend, column[first:last], budget) for column in columns]
        rows = []
        for at in range(last - first):
            read = [one[at] for one in encoded]
            kept = _cut(backend, [column[first + at] for column in columns], read, budget)
            rows.append(_assembled(template, kept, is_cut=_is_longer(read, budget)))
        yield rows


def _encode_ends(backend: Any, columns: Sequence[Sequence[str]], max_length: int) -> Iterator[list[EncodedRow]]:
    """As `encode_rows`, by the library's own truncation, for which a text must be read to its end."""
    backend.enable_truncation(max_length, strategy="longest_first", direction="left")
    for first, last in _chunks(columns, max_length):
        rows = list(zip(*(column[first:last] for column in columns), strict=True))
        encoded = backend.encode_batch(rows if len(columns) == 2 else [text for (text,) in rows])
        yield [EncodedRow(row.ids, row.type_ids, bool(row.overflowing)) for row in encoded]
    backend.no_truncation()


def encode_in_python(tokenizer: Any, columns: Sequence[Sequence[str]], max_length: int) -> Iterator[list[EncodedRow]]:
    """As `encode_rows`, for tokenizers of transformers without a Rust backend."""
    for first, last in _chunks(columns, max_length):
        texts = [list(column[first:last]) for column in columns]
        found = tokenizer(*texts, truncation="longest_first", max_length=max_length, return_attention_mask=False)
        types = found.get("token_type_ids") or [[0] * len(ids) for ids in found["input_ids"]]
        rows = zip(*texts, strict=True)
        # Only a second reading distinguishes a full row from one that is cut. Rows of full length are encoded twice.
        cut = [
            len(ids) == max_length and len(tokenizer(*row, verbose=False)["input_ids"]) > max_length
            for ids, row in zip(found["input_ids"], rows, strict=True)
        ]
        yield [EncodedRow(*row) for row in zip(found["input_ids"], types, cut, strict=True)]


def encode_windows(
    tokenizer: Any, columns: Sequence[Sequence[str]], max_length: int, windows: Windows
) -> Iterator[list[list[EncodedRow]]]:
    """Chunks of rows, each as its sequences in order: one where the row fits, else its windows.

    They are those of the library's truncation with a stride. Of a pair the longer text goes into windows and the
    shorter one stands in each of them: `only_first` or `only_second`, whichever is the longer.

    Args:
        tokenizer: of transformers; a backend in Rust does not truncate.
        max_length: tokens of a sequence, special ones included.

    Raises:
        WindowTooSmallError: a window has `windows.stride` tokens or fewer beside special tokens and the shorter text.
    """
    budget = max_length - tokenizer.num_special_tokens_to_add(len(columns) == 2)
    if budget <= windows.stride:
        raise WindowTooSmallError(None, budget)
    keeps_end = tokenizer.truncation_side == "left"
    # If the end of a text counts, all of its tokens are needed; otherwise only those of the windows that are kept.
    needed = 1 << 40 if keeps_end else budget + (windows.most - 1) * (budget - windows.stride)
    if tokenizer.is_fast:
        read, assemble = _of_backend(tokenizer, len(columns))
    else:
        read, assemble = _of_python(tokenizer)
    for first, last in _chunks(columns, needed):
        encoded = [read(column[first:last], needed) for column in columns]
        rows = []
        for at in range(last - first):
            try:
                kept, is_cut = _windows_of([one[at] for one in encoded], budget, windows, keeps_end)
            except WindowTooSmallError as error:
                raise WindowTooSmallError(first + at, error.capacity) from None
            rows.append([assemble(parts, is_cut) for parts in kept])
        yield rows


_Read = Callable[[Sequence[str], int], list[tuple[list[int], bool]]]
_Assemble = Callable[[list[list[int]], bool], EncodedRow]


def _of_backend(tokenizer: Any, texts: int) -> tuple[_Read, _Assemble]:
    """How a tokenizer with a backend reads texts, and how it makes a sequence of their ids."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    template = _template(backend, texts)
    return (
        lambda column, needed: _beginnings(backend, column, needed),
        lambda parts, is_cut: _assembled(template, parts, is_cut),
    )


def _of_python(tokenizer: Any) -> tuple[_Read, _Assemble]:
    """As `_of_backend`, for a tokenizer without a backend."""

    def read(column: Sequence[str], needed: int) -> list[tuple[list[int], bool]]:
        return [(ids, True) for ids in tokenizer(list(column), add_special_tokens=False, verbose=False)["input_ids"]]

    def assemble(parts: list[list[int]], is_cut: bool) -> EncodedRow:
        found = tokenizer.prepare_for_model(*parts)
        return EncodedRow(found["input_ids"], found.get("token_type_ids") or [0] * len(found["input_ids"]), is_cut)

    return read, assemble


def _windows_of(
    encoded: list[tuple[list[int], bool]], budget: int, windows: Windows, keeps_end: bool
) -> tuple[list[list[list[int]]], bool]:
    """The ids of each text in each window of one row, and whether text is left out.

    Args:
        encoded: ids of each text, and whether they are all.
        budget: tokens of text in a window.
    """
    texts = [ids for ids, _ in encoded]
    if not _is_longer(encoded, budget):
        return [texts], False
    longer = max(range(len(texts)), key=lambda at: (len(texts[at]), at))
    ids, is_whole = encoded[longer]
    capacity = budget - sum(map(len, texts)) + len(ids)
    if capacity <= windows.stride:
        raise WindowTooSmallError(None, max(0, capacity))
    step = capacity - windows.stride
    count = -(-(len(ids) - capacity) // step) + 1
    starts = range(0, min(count, windows.most) * step, step)
    borders = [(start, min(start + capacity, len(ids))) for start in starts]
    if keeps_end:
        borders = [(len(ids) - end, len(ids) - start) for start, end in borders]
    parts = [[*texts[:longer], ids[start:end], *texts[longer + 1 :]] for start, end in borders]
    return parts, not is_whole or count > windows.most


def _is_longer(encoded: list[tuple[list[int], bool]], budget: int) -> bool:
    """Whether the texts of a row have more tokens than `budget`. A text that was not read to its end always has."""
    return sum(len(ids) for ids, _ in encoded) > budget or not all(is_whole for _, is_whole in encoded)


def _template(backend: Any, texts: int) -> list[_Part]:
    """The places of a row's special tokens, and the token type of each part."""
    sample = backend.encode("a", "b") if texts == 2 else backend.encode("a")
    parts: list[_Part] = []
    for token, sequence, type_id in zip(sample.ids, sample.sequence_ids, sample.type_ids, strict=True):
        own = () if sequence is not None else (token,)
        if parts and (parts[-1].text, parts[-1].type_id) == (sequence, type_id):
            parts[-1] = _Part(parts[-1].ids + own, sequence, type_id)
        else:
            parts.append(_Part(own, sequence, type_id))
    return parts


def _chunks(columns: Sequence[Sequence[str]], budget: int) -> Iterator[tuple[int, int]]:
    """First row and end of each chunk; a long text counts as far as it is read at first."""
    first = size = 0
    for at, row in enumerate(zip(*columns, strict=True), 1):
        size += sum(min(len(text), budget * _CHARACTERS_PER_TOKEN) + 16 for text in row)
        if size >= _CHUNK_CHARACTERS:
            yield first, at
            first, size = at, 0
    if first < len(columns[0]):
        yield first, len(columns[0])


def _beginnings(backend: Any, texts: Sequence[str], budget: int) -> list[tuple[list[int], bool]]:
    """The ids of each text, at least its first `budget` ones, and whether they are all."""
    found: list[tuple[list[int], bool]] = [([], True)] * len(texts)
    size, missing = max(1, budget) * _CHARACTERS_PER_TOKEN, list(range(len(texts)))
    while missing:
        read = [_shortened(backend, texts[at])[:size] if size > _PIECE else texts[at][:size] for at in missing]
        left = []
        for at, part, encoding in zip(missing, read, backend.encode_batch(read, add_special_tokens=False), strict=True):
            is_whole = len(part) < size or len(texts[at]) <= size
            if is_whole or _settled(encoding) >= budget:
                found[at] = (encoding.ids, is_whole)
            else:
                left.append(at)
        missing, size = left, size * 4
    return found


def _shortened(backend: Any, text: str) -> str:
    """`text` with long runs of characters shortened, if WordPiece encodes them the same at any length."""
    limit = getattr(backend.model, "max_input_chars_per_word", 1 << 30)
    return _LONG_RUN.sub(r"\1\2", text) if limit < 20000 else text


def _settled(encoding: Any) -> int:
    """Tokens that stay as they are when more text is read: those of words before the last two.

    Where the tokenizer knows no words they are those far from the end: merges are local.
    """
    words = encoding.word_ids
    if not words:
        return 0
    last = words[-1] or 0
    return max(sum(word is not None and word < last - 1 for word in words), len(words) - _FAR)


def _cut(backend: Any, texts: list[str], encoded: list[tuple[list[int], bool]], budget: int) -> list[list[int]]:
    """The ids of a row's texts that fit into `budget`, by the library's longest_first rule."""
    if len(encoded) == 1:
        return [encoded[0][0][:budget]]
    lengths = [len(ids) for ids, _ in encoded]
    half = budget // 2
    # An odd token goes to the longer text. Only then must both texts be counted to their ends.
    if budget % 2 and min(lengths) > half and not all(is_whole for _, is_whole in encoded):
        known = [length for length, (_, is_whole) in zip(lengths, encoded, strict=True) if is_whole]
        if not known or known[0] >= budget:
            lengths = [_count(backend, text) for text in texts]
        else:
            lengths = [length if is_whole else budget for length, (_, is_whole) in zip(lengths, encoded, strict=True)]
    return [ids[:share] for (ids, _), share in zip(encoded, _shares(*lengths, budget), strict=True)]


def _shares(first: int, second: int, budget: int) -> tuple[int, int]:
    """Tokens that two texts of `first` and `second` tokens keep."""
    shorter = min(first, second)
    longer = max(shorter, budget - shorter)
    if shorter + longer > budget:
        shorter = budget // 2
        longer = budget - shorter
    return (longer, shorter) if first > second else (shorter, longer)


def _count(backend: Any, text: str) -> int:
    """Tokens of a whole text, piece by piece; a piece ends where white space begins."""
    total, at, text = 0, 0, _shortened(backend, text)
    while at < len(text):
        border = re.compile(r"(?<=\S)\s").search(text, at + _PIECE)
        end = border.start() if border else len(text)
        total += len(backend.encode(text[at:end], add_special_tokens=False))
        at = end
    return total


def _assembled(template: list[_Part], kept: list[list[int]], is_cut: bool) -> EncodedRow:
    row = EncodedRow([], [], is_cut)
    for part in template:
        own = part.ids if part.text is None else kept[part.text]
        row.ids.extend(own)
        row.types.extend([part.type_id] * len(own))
    return row


def flat_arrays(chunk: list[EncodedRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids end to end `[tokens]` int32, lengths `[rows]` int64 and token types `[tokens]` int8."""
    lengths = np.fromiter((len(row.ids) for row in chunk), np.int64, len(chunk))
    tokens = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(row.ids for row in chunk), np.int32, tokens)
    return ids, lengths, np.fromiter(chain.from_iterable(row.types for row in chunk), np.int8, tokens)
