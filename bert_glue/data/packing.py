"""Where each sequence of a packed batch lies, as host numbers, and the blocks that attention computes.

A packed batch lays its sequences end to end, `[1, tokens]`, in the order of the samples. The borders stay on
the host (`cu_seq_lens`), so that no kernel launch has to wait for a device-to-host copy.

No two random batches have the same lengths, but their shapes recur: token counts are rounded up, and attention works
on blocks of rows whose widths and counts are rounded up too. Libraries and compilers make a kernel for each new shape
and keep it. oneDNN takes 3 ms for a bf16 product that then runs in 0.5 ms, and a run's memory grew with every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from itertools import groupby

import numpy as np
import torch

# Sizes of token counts between one power of two and the next, and the least step between sizes, tokens: a batch of 32
# rows has 1 % of filler at 53 tokens a row and 2 % at 11. Recorded steps have half as many sizes: 94 instead of 89 of
# 100 passes are then replayed in 115 steps of batch 32, and 2 % are filler (simulated with rows like MRPC's).
COUNTS, COARSE_COUNTS, _LEAST_COUNT_STEP = 32, 16, 16
# The same of the width and the number of a block's rows. Over 300 batches of 32 rows like MRPC's this makes 20 shapes.
_SIZES, _WIDTH_STEP, _ROWS_STEP = 8, 16, 4
# A row may have this share of its block's width or more: below it the padded products cost more than another block's
# launches (measured on 2 CPU cores).
_SHORTEST_IN_BLOCK = 0.75
# Sequences up to this length share rows of this width, up to `_SLOTS` in one. Products of 32 x 32 cost as much as those
# of 12 x 12, of which there would be three times as many.
_SHARED_WIDTH, _SLOTS = 32, 8


def _step(size: int, sizes: int, least_step: int) -> int:
    return max(least_step, (1 << (size - 1).bit_length()) // (2 * sizes))


def _rounded_up(size: int, sizes: int, least_step: int) -> int:
    """`size` (> 0) to the next of `sizes` steps between one power of two and the next."""
    step = _step(size, sizes, least_step)
    return -(-size // step) * step


def bucket(tokens: int, counts: int = COUNTS) -> int:
    """The smallest token count that holds `tokens` (> 0), of `counts` between one power of two and the next."""
    return _rounded_up(tokens, counts, _LEAST_COUNT_STEP)


def width_bucket(longest: int) -> int:
    """The smallest width in use of padded rows that holds `longest` tokens (> 0)."""
    return _rounded_up(longest, _SIZES, _WIDTH_STEP)


def _chunk_width(window: int) -> int:
    """Queries in a row of a long sequence, tokens: no key lies in more than two rows, and half of the keys are read."""
    return -(-2 * window // _WIDTH_STEP) * _WIDTH_STEP


def _shortest_in_block(width: int) -> float:
    # All that no smaller width holds: a block of width 48 takes 33 tokens too, which are less than that share.
    return min(_SHORTEST_IN_BLOCK * width, width - _step(width, _SIZES, _WIDTH_STEP) + 1)


def _row_count(rows: int) -> int:
    return rows if rows <= 2 else _rounded_up(rows, _SIZES, _ROWS_STEP)


@dataclass(frozen=True)
class AttentionBlock:
    """Rows of one width, each with one sequence or with several short ones.

    Args:
        tokens: token of the batch in each cell, `[rows, width]` int64; -1 where there is none.
        sequences: sequences of each row in their order, `[rows, slots]` int64; -1 where there is none.
        owners: sequence of each cell, `[rows, width]` int64; -1 where there is none.
        window: tokens that a query sees to both sides; None for all.
        chunk_keys: where rows are parts of long sequences, the tokens that their queries see, from `window` tokens
            before the row to `window` tokens after it, `[rows, width + 2 * window]` int64; -1 where there is none.
    """

    tokens: torch.Tensor
    sequences: torch.Tensor
    owners: torch.Tensor
    window: int | None = None
    chunk_keys: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width."""
        return tuple(self.tokens.shape)

    @property
    def keys(self) -> torch.Tensor:
        """Token of the batch in each cell that queries read, `[rows, keys]` int64; -1 where there is none."""
        return self.tokens if self.chunk_keys is None else self.chunk_keys

    def hidden_keys(self, first_only: bool) -> torch.Tensor | None:
        """True where a query must not read a key, `[rows, 1, queries or 1, width]` bool; None if each reads all.

        Args:
            first_only: queries are of the sequences' first tokens, `slots` in a row.
        """
        return self._hidden_from_first if first_only else self._hidden

    @cached_property
    def _hidden(self) -> torch.Tensor | None:
        if self.window is not None:
            return self._hidden_by_window()
        # A row's only sequence needs no mask a query: what is computed of padding is never read.
        return self._keys_of_others(self.owners if self.sequences.shape[1] > 1 else self.sequences)

    @cached_property
    def _hidden_from_first(self) -> torch.Tensor | None:
        return self._keys_of_others(self.sequences)

    def _hidden_by_window(self) -> torch.Tensor:
        shift = 0 if self.chunk_keys is None else self.window
        query, key = torch.arange(self.tokens.shape[1]) + shift, torch.arange(self.keys.shape[1])
        is_far = (query[:, None] - key).abs() > self.window
        if self.chunk_keys is None:
            return (self.owners[:, :, None] != self.owners[:, None, :])[:, None] | is_far
        # A row's keys are of one sequence; queries without a token compute what is never read.
        return (self.chunk_keys < 0)[:, None, None] | is_far

    def _keys_of_others(self, queries: torch.Tensor) -> torch.Tensor | None:
        # Padding reads padding, so that no query is left without a key: its softmax would not be finite.
        hidden = (queries[:, :, None] != self.owners[:, None, :])[:, None]
        return hidden if hidden.any() else None


@dataclass(frozen=True)
class PackedLayout:
    """The borders of the sequences in one packed batch.

    Args:
        lengths: tokens of each sequence (host), all >= 1.
        tail: tokens of filler after the last sequence, which round up the token count; they form one sequence of
            their own that nothing reads.
        window: tokens that attention sees to both sides of a query; None for all.
    """

    lengths: tuple[int, ...]
    tail: int = 0
    window: int | None = None

    def within(self, window: int | None) -> PackedLayout:
        """This layout with a window, made once a batch; itself where every sequence fits into the window."""
        if window is None or max(self.lengths) <= window + 1:
            return self
        if window not in self._windowed:
            self._windowed[window] = PackedLayout(self.lengths, self.tail, window)
        return self._windowed[window]

    @cached_property
    def _windowed(self) -> dict[int, PackedLayout]:
        return {}

    @cached_property
    def all_lengths(self) -> tuple[int, ...]:
        """Lengths with the filler as a last sequence."""
        return (*self.lengths, self.tail) if self.tail else self.lengths

    @cached_property
    def cu_seq_lens(self) -> tuple[int, ...]:
        """Cumulative lengths with the leading 0, on the host."""
        return (0, *np.cumsum(self.all_lengths).tolist())

    @cached_property
    def _borders(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """`cu_seq_lens` on a device, `[sequences + 1]` int32; copied once a batch."""
        # From pageable memory, so the driver stages the few bytes at once: the host may go on and reuse them.
        if device not in self._borders:
            host = torch.tensor(self.cu_seq_lens, dtype=torch.int32)
            self._borders[device] = host.to(device, non_blocking=True)
        return self._borders[device]

    def keep_cu_seqlens(self, borders: torch.Tensor) -> None:
        """Keep a copy of `cu_seq_lens`, `[sequences + 1]` int32, that is already on its device."""
        self._borders[borders.device] = borders

    @property
    def tokens(self) -> int:
        """Number of computed tokens, filler included."""
        return self.cu_seq_lens[-1]

    @property
    def real_tokens(self) -> int:
        """Tokens that belong to samples."""
        return self.tokens - self.tail

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, filler included."""
        return max(self.all_lengths)

    @cached_property
    def positions(self) -> np.ndarray:
        """Position of each token in its own sequence, `[tokens]` int64; 0 throughout the filler.

        Filler may be longer than a model's position table.
        """
        starts = np.repeat(self.cu_seq_lens[:-1], self.all_lengths)
        positions = np.arange(self.tokens) - starts
        positions[self.real_tokens :] = 0
        return positions

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Sequences of equal length that follow one another, without filler: (first, end) of each, in order."""
        found, begin = [], 0
        for _, members in groupby(self.lengths):
            found.append((begin, begin + len(tuple(members))))
            begin = found[-1][1]
        return tuple(found)

    @cached_property
    def blocks(self) -> tuple[AttentionBlock, ...]:
        """Blocks that hold each sequence once, the longest first; filler is in none."""
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        blocks, begin = [], 0
        if self.window is not None:
            begin = sum(self.lengths[i] > 2 * _chunk_width(self.window) for i in order)
            blocks += [self._chunks(order[:begin])] if begin else []
        while begin < len(order) and (longest := self.lengths[order[begin]]) > _SHARED_WIDTH:
            width = width_bucket(longest)
            least = _shortest_in_block(width)
            similar = sum(self.lengths[i] >= least for i in order[begin:])
            # Rows that round up the count hold the next shorter sequences, which costs no more than filler there.
            rows = _row_count(max(similar, 1))
            blocks.append(self._block([[i] for i in order[begin : begin + rows]], rows, width, 1))
            begin += rows
        if begin < len(order):
            shared = self._shared_rows(order[begin:])
            blocks.append(self._block(shared, _row_count(len(shared)), _SHARED_WIDTH, _SLOTS))
        return tuple(blocks)

    def _shared_rows(self, order: list[int]) -> list[list[int]]:
        """Short sequences, the longest first, each in the row that it leaves the least of."""
        rows: list[list[int]] = []
        by_space: dict[int, list[int]] = {}  # rows by how many tokens they still take
        for sequence in order:
            length = self.lengths[sequence]
            space = next((space for space in range(length, _SHARED_WIDTH) if by_space.get(space)), _SHARED_WIDTH)
            if space == _SHARED_WIDTH:
                row = len(rows)
                rows.append([])
            else:
                row = by_space[space].pop()
            rows[row].append(sequence)
            if len(rows[row]) < _SLOTS:
                by_space.setdefault(space - length, []).append(row)
        return rows

    def _chunks(self, long: list[int]) -> AttentionBlock:
        """Long sequences cut into rows of queries, each with the keys around it: memory grows with the length alone."""
        width, window = _chunk_width(self.window), self.window
        pieces = [(i, begin) for i in long for begin in range(0, self.lengths[i], width)]
        rows = _row_count(len(pieces))
        tokens, owners = np.full((2, rows, width), -1, np.int64)
        keys = np.full((rows, width + 2 * window), -1, np.int64)
        sequences = np.full((rows, 1), -1, np.int64)
        for row, (sequence, begin) in enumerate(pieces):
            first, length = self.cu_seq_lens[sequence], self.lengths[sequence]
            own = np.arange(begin, min(begin + width, length))
            tokens[row, : len(own)], owners[row, : len(own)] = first + own, sequence
            read = np.arange(max(begin - window, 0), min(begin + width + window, length))
            keys[row, read - begin + window] = first + read
            sequences[row] = sequence
        return AttentionBlock(*map(torch.from_numpy, (tokens, sequences, owners)), window, torch.from_numpy(keys))

    def _block(self, members: list[list[int]], rows: int, width: int, slots: int) -> AttentionBlock:
        tokens, owners = np.full((2, rows, width), -1, np.int64)
        sequences = np.full((rows, slots), -1, np.int64)
        for row, own in enumerate(members):
            sequences[row, : len(own)] = own
            begin = 0
            for sequence in own:
                first, length = self.cu_seq_lens[sequence], self.lengths[sequence]
                tokens[row, begin : begin + length] = np.arange(first, first + length)
                owners[row, begin : begin + length] = sequence
                begin += length
        return AttentionBlock(*map(torch.from_numpy, (tokens, sequences, owners)), self.window)

    def head_rows(self, heads: int, cells: Cells, heads_first: bool = False) -> HeadRows:
        """Where rows of one head lie, made once a batch.

        Args:
            cells: of all queries, of those of each sequence's first token alone, or of the keys.
            heads_first: whether the rows of one head lie together in a block, and not those of one row.
        """
        # All layers have the same heads, so each index is computed once and read by every layer, forward and backward.
        if cells is Cells.KEYS and all(block.chunk_keys is None for block in self.blocks):
            cells = Cells.QUERIES
        place = heads, cells, heads_first
        if place not in self._places:
            self._places[place] = HeadRows(self, *place)
        return self._places[place]

    @cached_property
    def _places(self) -> dict[tuple[int, Cells, bool], HeadRows]:
        return {}


class Cells(Enum):
    """Which cells of the blocks hold the rows of a tensor."""

    QUERIES = auto()
    FIRST = auto()
    KEYS = auto()


class HeadRows:
    """Blocks of a layout laid end to end, by rows of one head, and a row of zeros.

    A block is `[rows, heads, cells]`, or `[heads, rows, cells]` with `heads_first`.

    Attributes:
        bounds: where each block begins and ends.
        rows: of all blocks and of zeros.
    """

    def __init__(self, layout: PackedLayout, heads: int, cells: Cells, heads_first: bool = False):
        self.heads = heads
        self.heads_first = heads_first
        self.bounds: list[tuple[int, int]] = []
        names = {Cells.QUERIES: "tokens", Cells.FIRST: "sequences", Cells.KEYS: "keys"}
        self._cells = [getattr(block, names[cells]) for block in layout.blocks]
        self._index: dict[int, list[torch.Tensor]] = {}
        self._empty: list[torch.Tensor] = []
        count = len(layout.all_lengths) if cells is Cells.FIRST else layout.tokens
        is_repeated = cells is Cells.KEYS  # keys at the borders of chunks lie in two rows, never in more
        of_rows = torch.full((1 + is_repeated, count, heads), -1)
        begin = 0
        for block, own in zip(layout.blocks, self._cells, strict=True):
            shape = (heads, len(own)) if heads_first else (len(own), heads)
            self.bounds.append((begin, begin + heads * own.numel()))
            places = torch.arange(*self.bounds[-1]).view(*shape, own.shape[1])
            places = places.permute(1, 2, 0) if heads_first else places.transpose(1, 2)
            is_real = own >= 0
            is_border = torch.zeros_like(is_real)
            if is_repeated and block.chunk_keys is not None:
                is_border[:, : block.window] = is_border[:, -block.window :] = True
                of_rows[1, own[is_real & is_border]] = places[is_real & is_border]
            of_rows[0, own[is_real & ~is_border]] = places[is_real & ~is_border]
            self._empty.append(places[~is_real].flatten() - begin)
            begin = self.bounds[-1][1]
        self.rows = begin + 1
        self._of_rows = torch.where(of_rows < 0, begin, of_rows).flatten(1)

    def in_order(self, rows: torch.Tensor) -> torch.Tensor:
        """`[rows of a head, dim]` of all blocks -> `[n * heads, dim]` in the order of the batch; filler gets zeros."""
        found = rows.index_select(0, self._of_rows[0])
        for again in self._of_rows[1:]:
            found += rows.index_select(0, again)
        return found

    def index(self, number: int, pitch: int) -> torch.Tensor:
        """Where the rows of a block come from, `[rows * heads * cells]` int64; empty cells repeat the first row.

        Args:
            pitch: rows of one head from one token to the next.
        """
        if pitch not in self._index:
            head = torch.arange(self.heads)[None, :, None]
            found = [cells.clamp(min=0)[:, None, :] * pitch + head for cells in self._cells]
            self._index[pitch] = [(x.transpose(0, 1) if self.heads_first else x).flatten() for x in found]
        return self._index[pitch][number]

    def empty(self, number: int) -> torch.Tensor:
        """Rows of a block that belong to no token, int64."""
        return self._empty[number]

    def count(self, number: int) -> tuple[int, int]:
        """Rows of a block, and queries or keys in each."""
        return tuple(self._cells[number].shape)
