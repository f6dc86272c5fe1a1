"""Where tokens of a packed batch lie: every cell accounted for once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bert_glue.data.batching import bucket
from bert_glue.data.packing import COARSE_COUNTS, COUNTS, Cells, PackedLayout, width_bucket
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
def test_blocks_hold_every_token_once_and_no_filler(seed):
    generator = np.random.default_rng(seed)
    lengths = tuple(int(n) for n in generator.integers(1, generator.choice([2, 20, 512]), size=seed + 1))
    layout = PackedLayout(lengths, tail=seed % 3)
    tokens, sequences = [], []
    for block in layout.blocks:
        rows, width = block.shape
        assert block.tokens.shape == block.owners.shape and block.sequences.shape[0] == rows
        is_real = block.tokens >= 0
        assert torch.equal(is_real, block.owners >= 0)
        for sequence in block.sequences[block.sequences >= 0].tolist():
            cells = block.tokens[block.owners == sequence]  # in order, and all in one row
            first = layout.cu_seq_lens[sequence]
            assert cells.tolist() == list(range(first, first + lengths[sequence]))
            assert int((block.owners == sequence).any(1).sum()) == 1
        tokens.append(block.tokens[is_real])
        sequences += block.sequences[block.sequences >= 0].tolist()
    assert torch.equal(torch.cat(tokens).sort().values, torch.arange(layout.real_tokens))
    assert sorted(sequences) == list(range(len(lengths)))


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("pitch", [3, 9], ids=["alone", "of a joint product"])
def test_rows_of_a_head_are_found_and_put_back(first_only, pitch):
    layout = PackedLayout((80, 1, 7, 6, 40, 2), tail=3)
    cells = Cells.FIRST if first_only else Cells.QUERIES
    head_rows, count = layout.head_rows(3, cells), len(layout.all_lengths) if first_only else layout.tokens
    filler = 1 if first_only else layout.tail
    rows = torch.arange(1, count * pitch + 1)
    taken = torch.cat([rows[head_rows.index(number, pitch)] for number in range(len(layout.blocks))])
    found = head_rows.in_order(torch.cat([taken, torch.zeros(1, dtype=torch.int64)])[:, None]).view(count, 3)
    assert torch.equal(found[:-filler], rows.view(count, pitch)[:-filler, :3]) and (found[-filler:] == 0).all()
    assert head_rows.rows == len(taken) + 1 and layout.head_rows(3, cells) is head_rows


def test_equal_lengths_that_fill_their_rows_need_no_mask():
    (block,) = PackedLayout((48,) * 8).blocks
    assert block.shape == (8, 48) and block.hidden_keys(False) is None and block.hidden_keys(True) is None


def test_short_sequences_share_rows():
    (block,) = PackedLayout((10, 12, 9, 20, 11, 2)).blocks
    assert block.shape == (2, 32) and (block.owners >= 0).sum() == 64


def test_a_row_has_few_sequences_however_short_they_are():
    (block,) = PackedLayout((1,) * 17).blocks
    assert (block.sequences >= 0).sum(1).tolist() == [8, 8, 1, 0]


def _lengths_like(mean: float, spread: float, count: int) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.clip(drawn.round().astype(int), 4, 128)


@pytest.mark.parametrize(
    ("mean", "spread", "most_filler"),
    [(53, 0.25, 0.03), (11, 0.35, 0.06), (68, 0.45, 0.04)],
    ids=["mrpc", "cola", "rte"],
)
def test_shapes_recur_and_filler_is_little(mean, spread, most_filler):
    """300 batches of 32 rows: token counts and attention blocks together."""
    counts, blocks = set(), set()
    for lengths in _lengths_like(mean, spread, 300 * 32).reshape(300, 32):
        real = int(lengths.sum())
        layout = PackedLayout(tuple(lengths.tolist()), bucket(real + 1) - real)
        assert layout.tail <= most_filler * real
        counts.add(layout.tokens)
        blocks |= {block.shape for block in layout.blocks}
    assert len(counts) + len(blocks) <= 64


@pytest.mark.parametrize(
    ("mean", "spread", "most_filler", "share"), [(53, 0.25, 0.03, 0.7), (11, 0.35, 0.06, 1.0)], ids=["mrpc", "cola"]
)
def test_coarse_counts_are_fewer_and_filler_stays_little(mean, spread, most_filler, share):
    """At 11 tokens a row the least step decides, which is the same for both."""
    totals = _lengths_like(mean, spread, 300 * 32).reshape(300, 32).sum(1)
    coarse, fine = ([bucket(int(total) + 1, counts) for total in totals] for counts in (COARSE_COUNTS, COUNTS))
    assert sum(coarse) - totals.sum() <= most_filler * totals.sum()
    assert len(set(coarse)) <= share * len(set(fine))


@pytest.mark.parametrize("length", [33, 35, 129, 160])
def test_what_no_smaller_width_holds_shares_a_block(length):
    """33 and 35 of 48 tokens are less than the share that longer rows need, and were a block each."""
    (block,) = PackedLayout((width_bucket(length), length, length, length)).blocks
    assert block.shape == (4, width_bucket(length))


def test_runs_are_neighbours_of_equal_length_without_filler():
    assert PackedLayout((7, 7, 4, 7, 1, 1, 1), tail=1).runs == ((0, 2), (2, 3), (3, 4), (4, 7))
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
