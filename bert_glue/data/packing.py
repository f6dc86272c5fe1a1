"""The positions of the sequences in a packed batch, as host numbers, and their groups for attention.

A packed batch holds its sequences end to end, `[1, tokens]`, in the order of the samples. Their cumulative lengths stay
on the host (`cu_seq_lens`), so that no kernel launch has to wait for a copy from the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch

# A group may pad its shorter sequences by this share of its longest before it is split: below it the
# padded products cost less than the launches of another group (measured on 2 CPU cores).
_SHORTEST_IN_GROUP = 0.75


@dataclass(frozen=True)
class LengthGroup:
    """Sequences of similar length, read as a padded block.

    Args:
        index: token position of each cell, `[sequences, longest]` int64; padding repeats the first token.
        sequences: which sequences of the batch these are, `[sequences]` int64.
        padding: True where a cell is padding, `[sequences, longest]` bool; None if there is none.
    """

    index: torch.Tensor
    sequences: torch.Tensor
    padding: torch.Tensor | None


@dataclass(frozen=True)
class PackedLayout:
    """The borders of the sequences in one packed batch.

    Args:
        lengths: tokens of each sequence (host), all >= 1.
        tail: tokens of filler after the last sequence, present where token counts are rounded to a
            bucket; they form one sequence of their own that nothing reads.
    """

    lengths: tuple[int, ...]
    tail: int = 0

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
        """Sequences of equal length that follow one another: (first, end) of each, in order."""
        found, begin = [], 0
        for _, members in groupby(self.all_lengths):
            found.append((begin, begin + len(tuple(members))))
            begin = found[-1][1]
        return tuple(found)

    @cached_property
    def groups(self) -> tuple[LengthGroup, ...]:
        """Sequences by similar length, longest first."""
        # Fewer groups mean fewer launches, with 2 products forward and 4 backward each. More groups mean less padding.
        order = sorted(range(len(self.all_lengths)), key=lambda i: -self.all_lengths[i])
        groups, begin = [], 0
        for end in range(1, len(order) + 1):
            longest = self.all_lengths[order[begin]]
            if end == len(order) or self.all_lengths[order[end]] < _SHORTEST_IN_GROUP * longest:
                groups.append(self._group(order[begin:end]))
                begin = end
        return tuple(groups)

    def _group(self, members: list[int]) -> LengthGroup:
        lengths = np.array([self.all_lengths[i] for i in members])[:, None]
        starts = np.array([self.cu_seq_lens[i] for i in members])[:, None]
        columns = np.arange(lengths.max())[None, :]
        is_padding = columns >= lengths
        # Every cell must name an existing token, because it is gathered. The result of padding is masked or never read.
        index = starts + np.where(is_padding, 0, columns)
        padding = torch.from_numpy(is_padding) if is_padding.any() else None
        return LengthGroup(torch.from_numpy(index), torch.tensor(members), padding)

    def head_rows(self, heads: int, first_only: bool) -> HeadRows:
        """Where rows of one head lie, made once a batch.

        Args:
            first_only: of the queries of each sequence's first token alone.
        """
        # All layers have the same heads, so each index is computed once and read by every layer, forward and backward.
        if (heads, first_only) not in self._places:
            self._places[heads, first_only] = HeadRows(self, heads, first_only)
        return self._places[heads, first_only]

    @cached_property
    def _places(self) -> dict[tuple[int, bool], HeadRows]:
        return {}


class HeadRows:
    """Blocks `[sequences, heads, longest]` of a layout's groups laid end to end, by rows of one head.

    `bounds` has where each block begins and ends, `of_row` where each row of `[n, heads]` lies, `[n * heads]` int64.
    """

    def __init__(self, layout: PackedLayout, heads: int, first_only: bool):
        self.heads = heads
        self.rows: list[torch.Tensor] = []
        self.bounds: list[tuple[int, int]] = []
        begin = 0
        self._index: dict[int, list[torch.Tensor]] = {}
        self.of_row = torch.empty(len(layout.all_lengths) if first_only else layout.tokens, heads, dtype=torch.int64)
        for group in layout.groups:
            rows = group.sequences[:, None] if first_only else group.index
            shape = (len(rows), heads, rows.shape[1])
            self.rows.append(rows)
            self.bounds.append((begin, begin + math.prod(shape)))
            cells = torch.arange(*self.bounds[-1]).view(shape).transpose(1, 2)
            # Only real cells are written: padded rows of a block are dropped when rows return to the order of tokens.
            is_real = slice(None) if first_only or group.padding is None else ~group.padding
            self.of_row[rows[is_real]] = cells[is_real]
            begin = self.bounds[-1][1]
        self.of_row = self.of_row.flatten()

    def index(self, number: int, pitch: int) -> torch.Tensor:
        """Where the rows of a group's block come from, `[sequences * heads * longest]` int64.

        Args:
            pitch: rows of one head from one token to the next.
        """
        if pitch not in self._index:
            head = torch.arange(self.heads)[None, :, None]
            self._index[pitch] = [(rows[:, None, :] * pitch + head).flatten() for rows in self.rows]
        return self._index[pitch][number]
