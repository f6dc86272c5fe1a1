"""Which samples form each step, on any number of ranks, and what a batch holds."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from token_splits import _assembler, _split

from bert_glue.data import batching
from bert_glue.data.batching import TrainingSampler, bucket, evaluation_batches, prefetch, rank_share


def _order(rows, micro_batch=4, accumulation=1, drop_last=False, lengths=None, seed=3) -> TrainingSampler:
    return TrainingSampler(rows, micro_batch, accumulation, seed, drop_last, lengths)


def _epoch(order: TrainingSampler, epoch: int = 0) -> list[list[np.ndarray]]:
    permutation = order.permutation(epoch)
    return [order.step(permutation, number) for number in range(order.steps_per_epoch)]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 22, 24])
def test_an_epoch_holds_every_sample_once(rows, accumulation):
    seen = np.concatenate([part for step in _epoch(_order(rows, accumulation=accumulation)) for part in step])
    assert sorted(seen.tolist()) == list(range(rows))


def test_accumulation_windows():
    steps = _epoch(_order(22, micro_batch=4, accumulation=4))
    assert [[len(part) for part in step] for step in steps] == [[4, 4, 4, 4], [4, 2]]


def test_drop_last_leaves_out_the_smaller_forward_pass():
    steps = _epoch(_order(22, micro_batch=4, accumulation=4, drop_last=True))
    assert [[len(part) for part in step] for step in steps] == [[4, 4, 4, 4], [4]]
    assert _order(3, micro_batch=4, drop_last=True).steps_per_epoch == 0
    assert len(_epoch(_order(20, micro_batch=4, drop_last=True))) == 5


def test_the_order_depends_on_seed_and_epoch_alone():
    order = _order(50)
    assert np.array_equal(order.permutation(2), _order(50, micro_batch=8, accumulation=2).permutation(2))
    assert not np.array_equal(order.permutation(0), order.permutation(1))
    assert not np.array_equal(order.permutation(0), _order(50, seed=4).permutation(0))


def test_length_grouping_shuffles_megabatches_and_wastes_less():
    lengths = np.random.default_rng(0).integers(3, 128, 900)
    grouped, plain = _order(900, lengths=lengths), _order(900)
    assert sorted(grouped.permutation(0).tolist()) == list(range(900))
    assert not np.array_equal(grouped.permutation(0), grouped.permutation(1))

    def padded(order):
        return sum(lengths[part].max() * len(part) for step in _epoch(order) for part in step)

    assert padded(grouped) < 1.1 * lengths.sum() < 1.4 * lengths.sum() < padded(plain)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 32])
def test_ranks_share_one_global_batch(rows):
    batch = np.random.default_rng(0).permutation(rows)
    for world in (1, 2, 8):
        shares = [rank_share(batch, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(shares), batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_sees_every_sample_once(world):
    for rows in range(1, 68):
        lengths = np.random.default_rng(rows).integers(1, 100, rows)
        batches = [b for rank in range(world) for b in evaluation_batches(lengths, 4, rank, world)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(rows)), rows
        assert all(1 <= len(b) <= 4 for b in batches)


def test_evaluation_goes_from_long_to_short():
    lengths = np.array([3, 9, 1, 7, 5])
    assert [b.tolist() for b in evaluation_batches(lengths, 2, 0, 1)] == [[1, 3], [4, 0], [2]]


# ---- assembly ----

ROWS = ([2, 10, 11, 3, 12, 3], [2, 13, 3], [2, 14, 3, 15, 16, 17, 3])
PAIRS = _split(ROWS, second_at=[4, 3, 3], labels=[1, 0, 2])


def test_packed_batch():
    batch = _assembler("packed")(PAIRS, np.array([2, 0]))
    inputs = {name: value.tolist() for name, value in batch.inputs.items() if name != "layout"}
    assert inputs == {
        "input_ids": [[*ROWS[2], *ROWS[0]]],
        "token_type_ids": [[0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]],
    }
    assert batch.inputs["layout"].lengths == (7, 6) and batch.inputs["layout"].tail == 0
    assert (batch.labels.tolist(), batch.samples, batch.real_tokens, batch.computed_tokens) == ([2, 1], 2, 13, 13)


def test_buckets_hold_their_tokens_and_are_few():
    sizes = [bucket(tokens) for tokens in range(1, 5000)]
    assert all(tokens <= size <= max(tokens + 15, tokens * 33 / 32) for tokens, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and all(bucket(size) == size for size in set(sizes))
    assert len({size for size in sizes if 1024 < size <= 2048}) == 32


def test_packed_batch_is_filled_up_to_its_bucket():
    batch = _assembler("packed", is_rounded=True, pad_id=7)(PAIRS, np.array([2, 0]))
    plain = _assembler("packed")(PAIRS, np.array([2, 0]))
    assert batch.inputs["layout"].tail == 3
    assert (batch.real_tokens, batch.computed_tokens) == (13, 16)
    for name, filler in (("input_ids", 7), ("token_type_ids", 0), ("position_ids", 0)):
        values = batch.inputs[name][0]
        assert torch.equal(values[:13], plain.inputs[name][0]) and (values[13:] == filler).all()


def test_a_bucket_that_fits_is_not_taken_as_filler_comes_always():
    """Else the number of sequences would tell batches of one size apart."""
    split = _split([[2] * 16, [2] * 5])
    layouts = [_assembler("packed", is_rounded=True)(split, np.array([row])).inputs["layout"] for row in (0, 1)]
    assert [(layout.tokens, len(layout.all_lengths)) for layout in layouts] == [(32, 2), (16, 2)]


@pytest.mark.parametrize(("limit", "width"), [(40, 16), (9, 9)])
def test_padded_width_is_a_bucket_within_the_models_limit(limit, width):
    collate = _assembler("longest", is_rounded=True, max_length=limit)
    batch = collate(PAIRS, np.array([1, 0]))
    assert batch.inputs["input_ids"].shape == (2, width) and batch.inputs["attention_mask"].sum() == 9
    assert collate.shapes == {batch.computed_tokens} == {2 * width}


def test_packed_batch_renumbers_for_a_narrowed_table():
    row_of_token = np.zeros(20, np.int32)
    row_of_token[[2, 3, 13]] = 5, 6, 7
    batch = _assembler("packed", row_of_token=row_of_token)(PAIRS, np.array([1]))
    assert batch.inputs["input_ids"].tolist() == [[5, 7, 6]]


@pytest.mark.parametrize(("padding", "width"), [("longest", 6), ("max_length", 9)])
def test_padded_batch(padding, width):
    batch = _assembler(padding, pad_id=1)(PAIRS, np.array([1, 0]))
    fill = width - 6
    inputs = {name: value.tolist() for name, value in batch.inputs.items()}
    assert inputs == {
        "input_ids": [[2, 13, 3, 1, 1, 1] + [1] * fill, [*ROWS[0]] + [1] * fill],
        "attention_mask": [[1, 1, 1, 0, 0, 0] + [0] * fill, [1] * 6 + [0] * fill],
        "token_type_ids": [[0] * width, [0, 0, 0, 0, 1, 1] + [0] * fill],
    }
    assert (batch.real_tokens, batch.computed_tokens) == (9, 2 * width)


def test_padded_batch_without_types_or_labels():
    batch = _assembler("longest", gives_types=False)(_split(ROWS), np.array([0]))
    assert set(batch.inputs) == {"input_ids", "attention_mask"} and batch.labels is None


# ---- ahead ----


def test_ahead_gives_the_same_items():
    assert list(prefetch(iter(range(20)))) == list(range(20))
    assert list(prefetch([])) == []


def test_ahead_works_before_it_is_asked():
    made = []
    items = prefetch((made.append(n) or n for n in range(10)), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 3 <= len(made) <= 4  # the one taken, two ready, and maybe one in the hand
    items.close()


def test_ahead_raises_what_the_thread_raised():
    def broken():
        yield 1
        raise ValueError("row 7")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="row 7"):
        next(items)


@pytest.mark.parametrize("source", ["endless", "ended", "failed"])
def test_ahead_ends_its_thread_when_it_is_left_early(source):
    """Also where the thread already waits to hand over its end or its error."""
    made = threading.Event()

    def items():
        for n in range(3 if source != "endless" else 10**9):
            yield n
            if n == 1:
                made.set()
        if source == "failed":
            raise ValueError("late")

    running = prefetch(items(), depth=2)
    assert next(running) == 0 and made.wait(5)
    time.sleep(0.15)
    begin = time.monotonic()
    running.close()
    assert time.monotonic() - begin < 2
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


@pytest.mark.parametrize(
    "labels", [None, [1, 0, 1], np.array([0.5, 2.0, 1.0], np.float32)], ids=["none", "int", "float"]
)
@pytest.mark.parametrize("padding", ["packed", "longest"])
def test_one_copy_holds_the_batch(monkeypatch, padding, labels):
    """From pinned memory, which a machine without a device does not have: the block is ordinary memory here."""
    blocks = []

    def block(size):
        blocks.append(torch.empty(size, dtype=torch.uint8))
        return blocks[-1]

    monkeypatch.setattr(batching, "_pinned_block", block)
    split = _split([range(1, 5), range(7, 9), range(3, 8)], labels=labels)
    rows = np.array([2, 0])
    plain, ours = (_assembler(padding, is_rounded=True, is_pinned=one)(split, rows) for one in (False, True))
    assert len(blocks) == 1 and blocks[0].numel() % 16 == 0
    layouts = [batch.inputs.pop("layout", None) for batch in (plain, ours)]
    assert layouts[0] == layouts[1]
    assert plain.inputs.keys() == ours.inputs.keys()
    for name, expected in plain.inputs.items():
        found = ours.inputs[name]
        assert torch.equal(found, expected) and found.dtype == expected.dtype and found.is_contiguous()
        assert found.data_ptr() % 16 == blocks[0].data_ptr() % 16
    assert (ours.labels is None) == (labels is None)
    if labels is not None:
        assert torch.equal(ours.labels, plain.labels) and ours.labels.dtype == plain.labels.dtype
    if padding == "packed":
        borders = ours.inputs["input_ids"].device
        assert torch.equal(layouts[1].cu_seqlens(borders), layouts[0].cu_seqlens(borders))
        assert layouts[1].cu_seqlens(borders).untyped_storage().data_ptr() == blocks[0].data_ptr()


def test_recorded_steps_have_half_as_many_token_counts():
    fine, coarse = (_assembler("packed", is_coarse=is_coarse).counts for is_coarse in (False, True))
    counts = [{bucket(n, one) for n in range(1025, 2049)} for one in (fine, coarse)]
    assert [len(found) for found in counts] == [fine, coarse] == [32, 16] and counts[1] < counts[0]
    assert all(n <= bucket(n, coarse) <= 1.0625 * n + 16 for n in range(1, 5000))
