"""Where tokens of a packed batch lie: every cell accounted for once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bert_glue.data.batching import bucket
from bert_glue.data.packing import PackedLayout
from bert_glue.training.cuda_graphs import RecordedLayout


def test_borders_and_counts_on_the_host():
    layout = PackedLayout((3, 1, 2), tail=4)
    assert layout.cu_seq_lens == (0, 3, 4, 6, 10)
    assert all(type(border) is int for border in layout.cu_seq_lens)
    assert (layout.tokens, layout.real_tokens, layout.longest) == (10, 6, 4)
    assert layout.positions.tolist() == [0, 1, 2, 0, 0, 1, 0, 0, 0, 0]


def test_without_filler():
    layout = PackedLayout((2, 5))
    assert layout.all_lengths == (2, 5) and layout.tokens == layout.real_tokens == 7
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(20))
def test_groups_hold_every_token_once(seed):
    generator = np.random.default_rng(seed)
    lengths = tuple(int(n) for n in generator.integers(1, generator.choice([2, 20, 512]), size=seed + 1))
    layout = PackedLayout(lengths, tail=seed % 3)
    tokens = torch.arange(layout.tokens)
    real, sequences, longest_before = [], [], 10**6
    for group in layout.groups:
        sizes = [layout.all_lengths[i] for i in group.sequences]
        assert group.index.shape == (len(sizes), max(sizes)) and max(sizes) <= longest_before
        # No sequence is padded to more than 4/3 of its length.
        assert min(sizes) >= 0.75 * max(sizes)
        longest_before = min(sizes)
        padding = torch.zeros_like(group.index, dtype=torch.bool) if group.padding is None else group.padding
        assert (group.padding is None) == (min(sizes) == max(sizes))
        assert (~padding).sum(1).tolist() == sizes
        assert torch.equal(group.index[padding], group.index[:, :1].expand_as(group.index)[padding])
        real.append(group.index[~padding])
        sequences += group.sequences.tolist()
    assert torch.equal(torch.cat(real).sort().values, tokens)
    assert sorted(sequences) == list(range(len(layout.all_lengths)))


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("pitch", [3, 9], ids=["alone", "of a joint product"])
def test_rows_of_a_head_are_found_and_put_back(first_only, pitch):
    layout = PackedLayout((8, 1, 7, 6, 8, 2), tail=3)
    head_rows, count = layout.head_rows(3, first_only), len(layout.all_lengths) if first_only else layout.tokens
    rows = torch.arange(count * pitch)
    taken = torch.cat([rows[head_rows.index(number, pitch)] for number in range(len(layout.groups))])
    assert torch.equal(taken[head_rows.of_row].view(count, 3), rows.view(count, pitch)[:, :3])
    assert [end - begin for begin, end in head_rows.bounds] == [
        3 * group.index[:, : 1 if first_only else None].numel() for group in layout.groups
    ]
    assert layout.head_rows(3, first_only) is head_rows


def test_equal_lengths_are_one_group_without_padding():
    (group,) = PackedLayout((7,) * 6).groups
    assert group.padding is None and group.index.shape == (6, 7)


def test_runs_are_neighbours_of_equal_length():
    assert PackedLayout((7, 7, 4, 7, 1, 1, 1), tail=1).runs == ((0, 2), (2, 3), (3, 4), (4, 8))
    assert PackedLayout((5,)).runs == ((0, 1),)


def test_a_recording_allows_for_the_longest_sequence_of_any_batch_of_its_shape():
    """Samples up to their limit, and filler, which another batch of as many tokens may have more of."""
    limit, draw = 20, np.random.default_rng(0)
    for count in (1, 3, 40, 400):
        for _ in range(50):
            lengths = tuple(draw.integers(1, limit + 1, count).tolist())
            tokens = bucket(sum(lengths) + 1)
            recorded = RecordedLayout(PackedLayout(lengths, tokens - sum(lengths)), torch.device("cpu"), limit)
            least = next(size for size in range(1, tokens + 1) if bucket(size) == tokens) - 1  # real tokens
            assert recorded.longest >= max(limit, tokens - least)
