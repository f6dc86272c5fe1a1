"""Attention within sequences against a naive loop: values, hand-written gradients, dropout, devices."""

from __future__ import annotations

import math
import sys
import types

import efficient_attention
import pytest
import torch
from loop_kernel import _loop_kernel

from bert_glue.data.packing import PackedLayout
from bert_glue.devices import device
from bert_glue.model import attention
from bert_glue.model.attention import (
    ATTENTION,
    attend,
    block_attention,
    fusion_attention,
    padded_attention,
    varlen_attention,
)
from bert_glue.model.layers import DropoutMasks

LAYOUTS = {
    "one": PackedLayout((6,)),
    "single token": PackedLayout((1,)),
    "equal": PackedLayout((4, 4, 4)),
    "padded rows": PackedLayout((8, 7, 6, 8)),
    "shared rows": PackedLayout((9, 1, 5, 2, 8, 1, 30, 3)),
    "many blocks": PackedLayout((40, 1, 70, 38, 2, 66, 33, 12, 31)),
    "runs": PackedLayout((7, 7, 7, 4, 1, 1)),
    "filler": PackedLayout((3, 5), tail=7),
}
SITE = 8
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
both_queries = pytest.mark.parametrize("first_only", [False, True])


def _inputs(layout, first_only, heads=3, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    counts = (len(layout.all_lengths) if first_only else layout.tokens, layout.tokens, layout.tokens)
    return [torch.randn(n, heads, dim, dtype=dtype, generator=generator, requires_grad=True) for n in counts]


def _keep_masks(layout, first_only, heads, drop, dropout_masks) -> dict[int, torch.Tensor]:
    """Mask of each sequence, `[heads, queries, keys]`, cut from the masks of its block."""
    masks = {}
    for number, block in enumerate(layout.blocks):
        rows, width = block.shape
        queries = block.sequences.shape[1] if first_only else width
        keep = dropout_masks.keep((rows, heads, queries, width), drop, SITE * 4096 + number)
        for row, slot in (block.sequences >= 0).nonzero().tolist():
            sequence = int(block.sequences[row, slot])
            (own,) = (block.owners[row] == sequence).nonzero(as_tuple=True)
            masks[sequence] = keep[row][:, [slot] if first_only else own][:, :, own]
    return masks


def _naive(query, key, value, layout, first_only, masks=None, drop=0.0):
    """A loop over sequences that knows nothing of blocks."""
    out = []
    for i, (begin, end) in enumerate(zip(layout.cu_seq_lens[:-1], layout.cu_seq_lens[1:], strict=True)):
        q = query[i : i + 1] if first_only else query[begin:end]
        scores = torch.einsum("qhd,khd->hqk", q, key[begin:end]) / math.sqrt(query.shape[-1])
        probabilities = scores.softmax(-1)
        if masks is not None and i in masks:  # filler has none
            probabilities = probabilities * masks[i] / (1 - drop)
        out.append(torch.einsum("hqk,khd->qhd", probabilities, value[begin:end]))
    return torch.cat(out)


def _assert_equal_with_gradients(ours, expected, inputs, layout, first_only, **limits) -> None:
    """Nothing reads filler, so it is left out."""
    real = len(layout.lengths) if first_only else layout.real_tokens
    ours, expected = ours[:real], expected[:real]
    torch.testing.assert_close(ours, expected, **limits)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((ours * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **limits)


@both_queries
@every_layout
@pytest.mark.parametrize("function", [block_attention, padded_attention])
def test_equals_the_naive_loop(function, layout, first_only):
    inputs = _inputs(layout, first_only)
    ours = function(*inputs, layout, first_only, 0.0, None, SITE)
    _assert_equal_with_gradients(ours, _naive(*inputs, layout, first_only), inputs, layout, first_only)


@both_queries
@every_layout
@pytest.mark.parametrize("dropout_masks", [None, DropoutMasks(3)])
def test_without_gradients_it_is_the_same_up_to_dropout(layout, first_only, dropout_masks):
    inputs, drop = _inputs(layout, first_only), 0.4
    with torch.no_grad():
        ours = attend(*inputs, layout, first_only, drop, dropout_masks, SITE)
    with_gradients = attend(*inputs, layout, first_only, drop, dropout_masks, SITE)
    torch.testing.assert_close(ours, with_gradients)


@both_queries
@every_layout
def test_dropout_has_the_same_masks_forward_and_backward(layout, first_only):
    inputs, dropout_masks, drop = _inputs(layout, first_only), DropoutMasks(5), 0.4
    ours = attend(*inputs, layout, first_only, drop, dropout_masks, SITE)
    masks = _keep_masks(layout, first_only, 3, drop, dropout_masks)
    _assert_equal_with_gradients(ours, _naive(*inputs, layout, first_only, masks, drop), inputs, layout, first_only)


@both_queries
def test_gradcheck(first_only):
    layout, dropout_masks = PackedLayout((4, 3, 1)), DropoutMasks(2)
    inputs = _inputs(layout, first_only, heads=2, dim=3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, layout, first_only, 0.3, dropout_masks, SITE), inputs, fast_mode=True
    )


def test_one_head_leaves_the_callers_gradient_alone():
    """With one head a transposed block is already contiguous: writing into it could reach the gradient."""
    layout = PackedLayout((4, 3))
    inputs = _inputs(layout, False, heads=1)
    gradient = torch.ones(7, 1, 4, dtype=torch.float64)
    attend(*inputs, layout, False, 0.0, None, SITE).backward(gradient)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_sequences_do_not_see_each_other():
    layout = PackedLayout((5, 4, 6))
    inputs = [x.detach() for x in _inputs(layout, False)]
    before = attend(*inputs, layout, False, 0.0, None, SITE)
    for x in inputs[1:]:
        x[5:9] = 1e3
    after = attend(*inputs, layout, False, 0.0, None, SITE)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[9:], after[9:])
    assert not torch.allclose(before[5:9], after[5:9])


def test_dropping_everything_gives_zeros_and_no_gradient():
    layout = PackedLayout((4, 3))
    inputs = _inputs(layout, False)
    assert torch.equal(
        attend(*inputs, layout, False, 1.0, DropoutMasks(0), SITE), torch.zeros(7, 3, 4, dtype=torch.float64)
    )


def test_dropout_preserves_the_expectation():
    """The same sequence 2000 times: the mean over masks is the value without dropout."""
    one, many = PackedLayout((6,)), PackedLayout((6,) * 2000)
    inputs = [x.detach() for x in _inputs(one, False)]
    out = attend(*(x.repeat(2000, 1, 1) for x in inputs), many, False, 0.3, DropoutMasks(0), SITE)
    mean = out.view(2000, 6, 3, 4).mean(0)
    torch.testing.assert_close(mean, _naive(*inputs, one, False), atol=0.08, rtol=0)


def test_padded_attention_drops_only_where_there_are_masks():
    layout = PackedLayout((6, 5))
    inputs = [x.detach() for x in _inputs(layout, False)]
    plain = padded_attention(*inputs, layout, False, 0.0, None, SITE)
    assert torch.equal(padded_attention(*inputs, layout, False, 0.5, None, SITE), plain)
    assert not torch.allclose(padded_attention(*inputs, layout, False, 0.5, DropoutMasks(0), SITE), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_in_its_dtype(dtype):
    layout = LAYOUTS["padded rows"]
    inputs = _inputs(layout, False, dtype=dtype)
    ours = attend(*inputs, layout, False, 0.2, DropoutMasks(0), SITE)
    ours.float().sum().backward()
    assert ours.dtype == inputs[0].grad.dtype == dtype and torch.isfinite(inputs[0].grad).all()


# ---- NPU, on a stand-in with the semantics of torch_npu's documentation ----


def _fake_npu_fusion_attention(query, key, value, head_num, input_layout, *, scale=1.0, keep_prob=1.0,
                               actual_seq_qlen=None, actual_seq_kvlen=None):  # fmt: skip
    """TND: `[T, N, D]`, cumulative lengths as host integers without the leading 0."""
    assert input_layout == "TND" and head_num == query.shape[1]
    for lengths, x in ((actual_seq_qlen, query), (actual_seq_kvlen, key)):
        assert isinstance(lengths, list | tuple) and all(type(n) is int for n in lengths)
        assert lengths[0] != 0 and list(lengths) == sorted(set(lengths)) and lengths[-1] == len(x)
    assert len(actual_seq_qlen) == len(actual_seq_kvlen)
    out, q_begin, k_begin = [], 0, 0
    for q_end, k_end in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[q_begin:q_end], key[k_begin:k_end]) * scale
        probabilities = torch.dropout(scores.softmax(-1), 1 - keep_prob, train=True)
        out.append(torch.einsum("hqk,khd->qhd", probabilities, value[k_begin:k_end]))
        q_begin, k_begin = q_end, k_end
    return torch.cat(out), None, None, None, 0, 0, 0


@pytest.fixture
def fusion_calls(monkeypatch):
    calls = []

    def record(*args, **kwargs):
        calls.append(kwargs)
        return _fake_npu_fusion_attention(*args, **kwargs)

    fake = types.ModuleType("torch_npu")
    fake.npu_fusion_attention = record
    monkeypatch.setitem(sys.modules, "torch_npu", fake)
    monkeypatch.setattr(attention, "has_packed_npu_attention", lambda: True)
    return calls


@both_queries
@every_layout
def test_npu_fusion_attention(fusion_calls, layout, first_only):
    inputs = _inputs(layout, first_only)
    ours = fusion_attention(*inputs, layout, first_only, 0.3, None, SITE)
    _assert_equal_with_gradients(ours, _naive(*inputs, layout, first_only), inputs, layout, first_only)
    assert len(fusion_calls) == 1 and fusion_calls[0]["keep_prob"] == 1.0


def test_npu_fusion_attention_drops_with_masks(fusion_calls):
    layout = LAYOUTS["equal"]
    fusion_attention(*_inputs(layout, False), layout, False, 0.3, DropoutMasks(0), SITE)
    assert fusion_calls[0]["keep_prob"] == pytest.approx(0.7)


@both_queries
def test_npu_without_the_packed_kernel_pads(monkeypatch, fusion_calls, first_only):
    monkeypatch.setattr(attention, "has_packed_npu_attention", lambda: False)
    layout = LAYOUTS["many blocks"]
    inputs = _inputs(layout, first_only)
    ours = fusion_attention(*inputs, layout, first_only, 0.0, None, SITE)
    torch.testing.assert_close(ours, _naive(*inputs, layout, first_only))
    assert fusion_calls == []


# ---- CUDA, on stand-ins for the kernels; nothing here ran on a GPU ----


def _refuses(*given):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.fixture
def kernels(monkeypatch):
    """`put(name=(function, has_dropout), ...)` takes the place of CUDA's kernels."""
    attention.cuda_kernel.cache_clear()
    yield lambda **table: monkeypatch.setattr(attention, "CUDA_KERNELS", table)
    attention.cuda_kernel.cache_clear()


@both_queries
@every_layout
def test_cuda_gives_the_kernel_borders_and_longest(kernels, layout, first_only):
    calls = []
    kernels(loop=(_loop_kernel(calls), True))
    inputs = _inputs(layout, first_only)
    ours = varlen_attention(*inputs, layout, first_only, 0.3, None, SITE)
    _assert_equal_with_gradients(ours, _naive(*inputs, layout, first_only), inputs, layout, first_only)
    assert calls == [(2, 2, 0.0), (1 if first_only else layout.longest, layout.longest, 0.0)]  # the probe, the call


@pytest.mark.parametrize(("drop", "expected"), [(0.0, "plain"), (0.2, "drops")])
def test_cuda_takes_the_first_kernel_that_runs_and_drops(kernels, drop, expected):
    kernels(refuses=(_refuses, True), plain=(_loop_kernel([]), False), drops=(_loop_kernel([]), True))
    inputs, layout = _inputs(LAYOUTS["equal"], False), LAYOUTS["equal"]
    attention.PATHS_TAKEN.clear()
    before = torch.get_rng_state()
    assert attention.cuda_kernel(inputs[0].device, torch.float64, 4, drop) == expected
    assert torch.equal(torch.get_rng_state(), before)  # a resumed run, which asks anew, goes on with the same numbers
    varlen_attention(*inputs, layout, False, drop, DropoutMasks(0), SITE)
    assert {f"packed: {expected}"} == attention.PATHS_TAKEN


def test_cuda_pads_inside_attention_where_no_kernel_runs(kernels):
    kernels(refuses=(_refuses, True))
    layout = LAYOUTS["many blocks"]
    inputs = _inputs(layout, False)
    torch.testing.assert_close(
        varlen_attention(*inputs, layout, False, 0.0, None, SITE), _naive(*inputs, layout, False)
    )


@pytest.fixture
def efficient(kernels):
    """Only torch's efficient kernel runs, computed on the CPU."""
    library = efficient_attention.register()
    kernels(**{"torch's efficient kernel": attention.CUDA_KERNELS["torch's efficient kernel"]})
    yield
    library._destroy()


@both_queries
@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_efficient_kernel_takes_borders_in_fp32(efficient, layout, first_only, dtype):
    inputs = _inputs(layout, first_only, dtype=dtype)
    attention.PATHS_TAKEN.clear()
    ours = varlen_attention(*inputs, layout, first_only, 0.3, None, SITE)
    _assert_equal_with_gradients(ours, _naive(*inputs, layout, first_only), inputs, layout, first_only)
    assert {"packed: torch's efficient kernel"} == attention.PATHS_TAKEN


def test_a_recordings_bound_may_be_above_the_tokens(efficient):
    """The bound of a recording is that of all later batches; the kernel's backward refuses it above the tokens."""
    layout = PackedLayout((4, 2))
    inputs = _inputs(layout, False)
    borders = layout.cu_seqlens(torch.device("cpu"))
    ours = attention._efficient_kernel(*inputs, borders, borders, 128, 128, 0.0)
    _assert_equal_with_gradients(ours, _naive(*inputs, layout, False), inputs, layout, False)


def test_the_efficient_kernel_has_no_window(efficient):
    found = attention.why_not("torch's efficient kernel", torch.device("cpu"), torch.float32, 4, 0.1, window=8)
    assert found == "ValueError: it has no window to both sides"


def test_the_kernels_are_tried_in_this_order():
    """The operator first: torch's own function over it costs the host more and has no dropout. fp32 comes last."""
    assert list(attention.CUDA_KERNELS) == [
        "torch's flash kernel", "torch's varlen kernel", "flash_attn's varlen kernel", "torch's efficient kernel",
    ]  # fmt: skip


def test_why_no_kernel_runs_is_kept(kernels):
    kernels(refuses=(_refuses, True), plain=(_loop_kernel([]), False))
    attention.REFUSALS.clear()
    assert attention.cuda_kernel(torch.device("cpu"), torch.float32, 4, 0.5) is None
    assert attention.REFUSALS == {
        "refuses": "RuntimeError: FlashAttention only supports Ampere GPUs or newer.",
        "plain": "it has no dropout (0.5)",
    }
    attention.REFUSALS.clear()
    assert attention.cuda_kernel(torch.device("cpu"), torch.float32, 4, 0.0) == "plain" and not attention.REFUSALS


def test_torchs_flash_kernel_takes_our_call():
    """On tensors without data: names, types and a gradient, no numbers."""
    q, k = (torch.empty(n, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (3, 10))
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    out = attention._flash_kernel(q, k, k, cu_seqlens, cu_seqlens, 1, 7, 0.1)
    out.sum().backward()
    assert out.shape == q.grad.shape == (3, 2, 16) and k.grad.shape == (10, 2, 16)


def test_each_kind_of_device_has_its_function():
    assert set(ATTENTION) == set(device.KINDS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slow_products_are_computed_in_fp32_and_rounded(monkeypatch, dtype):
    """Where a CPU has no kernels of a dtype: the fp32 product of the same 16-bit numbers, rounded once."""
    from bert_glue.model import layers

    monkeypatch.setattr(layers, "has_slow_products", lambda kind, dtype: dtype != torch.float32)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 64).to(dtype), torch.randn(3, 64).to(dtype), torch.randn(3).to(dtype)
    exact = torch.nn.functional.linear(x.float(), weight.float(), bias.float()).to(dtype)
    assert torch.equal(layers.linear(x, weight, bias), exact)
    with torch.autocast("cpu", dtype=dtype):  # O1: fp32 in, 16 bits out
        assert torch.equal(layers.linear(x.float(), weight.float(), bias.float()), exact)
    layer = layers.Linear(64, 3).to(dtype)
    layer.adds_into_grad = True
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    view = layer.weight.grad
    layer(x).float().sum().backward()
    assert layer.weight.grad is view and torch.equal(view[0], x.float().sum(0).to(dtype))
