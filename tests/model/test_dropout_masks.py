"""Dropout masks: the right rate, the same at the same address, different elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from bert_glue.model.layers import DropoutMasks, dropout

SHAPE = (400, 500)
CELLS = 400 * 500


def _noise(seed: int = 0, rank: int = 0, step: int = 0) -> DropoutMasks:
    noise = DropoutMasks(seed, rank)
    noise.begin(step)
    return noise


@pytest.mark.parametrize("drop", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_keep_rate(drop):
    kept = _noise().keep(SHAPE, drop, 7).double().mean().item()
    assert abs(kept - (1 - drop)) < 5 * math.sqrt(drop * (1 - drop) / CELLS) + 1 / 65536


def test_cells_are_independent_of_their_neighbours():
    keep = _noise().keep(SHAPE, 0.5, 7).double() - 0.5
    for distance in (1, 2, 3, 4, 500):
        a, b = keep.flatten()[:-distance], keep.flatten()[distance:]
        assert abs((a * b).mean() / 0.25) < 5 / math.sqrt(CELLS)


def test_the_same_address_gives_the_same_mask_whatever_was_drawn_before():
    first, second = _noise(1, 2, 3), _noise(1, 2, 3)
    second.keep((5, 5), 0.1, 1)
    assert torch.equal(first.keep((31, 7), 0.3, 4), second.keep((31, 7), 0.3, 4))


@pytest.mark.parametrize("change", [{"seed": 9}, {"rank": 9}, {"step": 9}])
def test_seed_rank_and_step_change_the_mask(change):
    address = {"seed": 1, "rank": 2, "step": 3}
    agree = _noise(**address).keep(SHAPE, 0.5, 4) == _noise(**{**address, **change}).keep(SHAPE, 0.5, 4)
    assert abs(agree.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(CELLS)


def test_sites_differ_and_parts_of_the_address_are_not_interchangeable():
    masks = [
        _noise(0, 0, 0).keep(SHAPE, 0.5, 1),
        _noise(0, 0, 0).keep(SHAPE, 0.5, 2),
        _noise(0, 0, 1).keep(SHAPE, 0.5, 0),
        _noise(0, 1, 0).keep(SHAPE, 0.5, 0),
    ]
    for number, one in enumerate(masks):
        for other in masks[:number]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shapes_that_are_no_multiple_of_a_draw(count):
    assert _noise().keep((count,), 0.5, 0).shape == (count,)


def test_nearly_all_dropped_still_has_a_mask():
    assert _noise().keep(SHAPE, 0.999999, 0).sum() < 20


def test_expectation_is_preserved():
    x = torch.full(SHAPE, 3.0)
    assert abs(dropout(x, 0.3, _noise(), 0).mean() - 3.0) < 5 * 3.0 * math.sqrt(0.3 / 0.7 / CELLS)


@pytest.mark.parametrize("with_residual", [False, True])
def test_forward_and_backward_share_one_mask(with_residual):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    residual = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    given = residual if with_residual else None
    expected = x.detach() * _noise().keep((6, 5), 0.4, 6) / 0.6 + (residual.detach() if with_residual else 0.0)
    torch.testing.assert_close(dropout(x, 0.4, _noise(), 6, given).detach(), expected)
    inputs = (x, residual) if with_residual else (x,)
    assert torch.autograd.gradcheck(lambda x, r=None: dropout(x, 0.4, _noise(), 6, r), inputs)


def test_off_without_noise_or_rate():
    x, residual = torch.randn(4, 5), torch.randn(4, 5)
    assert dropout(x, 0.5, None, 0) is x and dropout(x, 0.0, _noise(), 0) is x
    assert torch.equal(dropout(x, 0.5, None, 0, residual), x + residual)


def test_everything_dropped():
    x, residual = torch.randn(4, 5), torch.randn(4, 5)
    assert torch.equal(dropout(x, 1.0, _noise(), 0), torch.zeros(4, 5))
    assert torch.equal(dropout(x, 1.0, _noise(), 0, residual), residual)


def test_dtype_is_kept():
    assert dropout(torch.ones(8, 8, dtype=torch.bfloat16), 0.5, _noise(), 0).dtype == torch.bfloat16
