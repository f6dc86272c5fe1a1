"""Attention over the sequences of a packed batch: one function a device, chosen by `attend`.

Every function takes `query [queries, heads, dim]`, `key` and `value [tokens, heads, dim]`. Either every token has a
query (`queries == tokens`), or only the first token of each sequence has one (`queries == sequences`), which is all
that the last layer of a classifier needs. A new device needs one more function and its entry in `ATTENTION`.

By hand because torch's CPU kernel with dropout falls back to a chain of a dozen autograd nodes a call, and a
batch of 32 sequences makes 1 to 5 calls a layer. A block's rows are gathered in one copy and put back in one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from bert_glue.data.packing import AttentionBlock, HeadRows, PackedLayout, width_bucket
from bert_glue.devices.device import has_slow_products
from bert_glue.devices.npu import torch_npu_of
from bert_glue.model.layers import DropoutMasks, as_numbers

# The kernels that have computed attention in this process; fallbacks have names of their own.
PATHS_TAKEN: set[str] = set()
# Rows and width of the padded blocks that it computed so far, with gradients: each is a kernel of its own.
BLOCK_SHAPES: set[tuple[int, int]] = set()


def block_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id) -> torch.Tensor:
    """CPU: one batched product a block, of sequences of similar length or of rows that short ones share."""
    PATHS_TAKEN.add("packed: blocks of rows")
    dtype, kind = query.dtype, query.device.type
    # Gradients and our dropout masks need the probabilities in memory. Evaluation uses a kernel that writes none.
    drops = dropout_masks is not None and drop > 0.0
    attention = BlockAttention.apply if drops or torch.is_grad_enabled() else _without_gradients
    if not has_slow_products(kind, dtype):
        return attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id)
    with torch.autocast(kind, enabled=False):
        # Three copies of `[tokens, hidden]` in fp32 cost less than torch's own 16-bit loops on such a CPU.
        query, key, value = query.float(), key.float(), value.float()
        return attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id).to(dtype)


def _without_gradients(query, key, value, layout, first_only, *_) -> torch.Tensor:
    """As `BlockAttention`, by torch's fused kernel, which writes no probabilities.

    Neighbours of equal length already form a block, so that nothing is gathered, padded or masked. Evaluation batches
    are sorted by length, which makes such runs long.
    """
    out = torch.zeros_like(query)  # of filler, which is in no run
    for first, end in layout.runs:
        tokens = slice(layout.cu_seq_lens[first], layout.cu_seq_lens[end])
        q_rows = slice(first, end) if first_only else tokens
        parts = query[q_rows], key[tokens], value[tokens]
        q, k, v = (part.unflatten(0, (end - first, -1)).transpose(1, 2) for part in parts)
        out[q_rows] = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    return out


def padded_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id) -> torch.Tensor:
    """Any device: padded inside attention only, to a width that recurs, through torch's fused kernel.

    It is used if no kernel takes cumulative lengths, or if that kernel has no dropout. Only the first token of filler
    is computed, because the width of the whole filler changes with every batch.
    """
    PATHS_TAKEN.add("padded inside attention only: no packed kernel takes this dtype, dropout or device")
    device, width = key.device, width_bucket(max(layout.lengths))
    # Built on the host, from host numbers, and sent without a wait: asking the device for lengths would stop it here,
    # in every layer. Padding repeats a sequence's first token, so that every index is valid; the mask hides it.
    starts = torch.tensor(layout.cu_seq_lens[:-1])[:, None]
    lengths = torch.tensor((*layout.lengths, 1) if layout.tail else layout.lengths)[:, None]
    columns = torch.arange(width)[None, :]
    is_real = columns < lengths
    index = torch.where(is_real, starts + columns, starts).to(device, non_blocking=True)
    mask = is_real[:, None, None, :]
    if device.type == "npu":
        # A boolean mask becomes -inf, which counts as an overflow on chips that saturate. BERT itself uses -1e4 (Devlin
        # et al. 2019).
        mask = torch.where(mask, 0.0, -1e4).to(query.dtype)
    mask = mask.to(device, non_blocking=True)
    BLOCK_SHAPES.add((len(lengths), width))
    sequences = torch.arange(len(lengths), device=device)[:, None]
    q, k, v = (
        x[rows].transpose(1, 2)
        for x, rows in ((query, sequences if first_only else index), (key, index), (value, index))
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop if dropout_masks else 0.0)
    out = out.transpose(1, 2)
    if first_only:
        return out[:, 0]
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(layout.all_lengths))
    cells = rows * width + torch.from_numpy(layout.positions)
    return out.flatten(0, 1)[cells.to(device, non_blocking=True)]


def _varlen_kernel(query, key, value, q_cu_seqlens, k_cu_seqlens, q_longest, k_longest, drop):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(query, key, value, q_cu_seqlens, k_cu_seqlens, q_longest, k_longest)


def _flash_kernel(*given):
    # varlen_attn calls this operator with dropout 0 (torch 2.13, torch/nn/attention/varlen.py); here it has dropout.
    return torch.ops.aten._flash_attention_forward(*given, False, False)[0]


def _flash_attn_kernel(*given):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(*given)


# name -> (function of query, key, value, both cu_seqlens `[sequences + 1]` int32, both longest, dropout; has dropout).
# The first one that runs is used. Their speeds have not been compared on a GPU yet.
CUDA_KERNELS: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    "torch's varlen kernel": (_varlen_kernel, False),
    "torch's flash kernel with dropout": (_flash_kernel, True),
    "flash_attn's varlen kernel": (_flash_attn_kernel, True),
}


def runs_here(name: str, device: torch.device, dtype: torch.dtype, dim: int, drop: float) -> bool:
    """True if a kernel of `CUDA_KERNELS` runs here; a forward and backward pass over two sequences decides.

    Args:
        dim: elements of one head.
        drop: dropout of attention probabilities, in [0, 1).
    """
    function, has_dropout = CUDA_KERNELS[name]
    if drop > 0.0 and not has_dropout:
        return False
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    try:
        # The probe draws no number from the generators of the run, or a resumed run would drop other elements.
        with torch.random.fork_rng([] if device.index is None else [device], device_type=device.type):
            probe = torch.zeros(3, 1, dim, dtype=dtype, device=device, requires_grad=True)
            with torch.enable_grad():
                function(probe, probe, probe, cu_seqlens, cu_seqlens, 2, 2, drop).sum().backward()
            probe.grad.sum().item()  # the host waits here, because a device reports a failure no earlier
    except Exception:  # a missing package, a chip, a dtype and a size fail in different ways
        return False
    return True


@cache
def cuda_kernel(device: torch.device, dtype: torch.dtype, dim: int, drop: float) -> str | None:
    """Name of the kernel that this device uses for heads of `dim` elements; None if no kernel runs."""
    return next((name for name in CUDA_KERNELS if runs_here(name, device, dtype, dim, drop)), None)


def varlen_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id) -> torch.Tensor:
    """CUDA: the first kernel of `CUDA_KERNELS` that runs; they take cu_seqlens, and half precision only."""
    rate = drop if dropout_masks is not None else 0.0
    name = cuda_kernel(query.device, query.dtype, query.shape[-1], rate)
    if name is None:
        return padded_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id)
    PATHS_TAKEN.add(f"packed: {name}")
    cu_seqlens = layout.cu_seqlens(query.device)
    q_cu_seqlens = torch.arange(len(cu_seqlens), dtype=torch.int32, device=query.device) if first_only else cu_seqlens
    q_longest = 1 if first_only else layout.longest
    return CUDA_KERNELS[name][0](query, key, value, q_cu_seqlens, cu_seqlens, q_longest, layout.longest, rate)


@cache
def has_packed_npu_attention() -> bool:
    """True if npu_fusion_attention accepts the TND layout here (Atlas A2 and later, or simulated).

    A call with two tokens decides, because the name of the chip does not show which CANN is installed.
    """
    torch_npu = torch_npu_of(torch.device("npu"))
    if torch_npu is None or not hasattr(torch_npu, "npu_fusion_attention"):
        return False
    probe = torch.zeros(2, 1, 16, dtype=torch.float16, device="npu")
    try:
        torch_npu.npu_fusion_attention(
            probe, probe, probe, 1, "TND", scale=1.0, actual_seq_qlen=(1, 2), actual_seq_kvlen=(1, 2)
        )
        torch.npu.synchronize()  # with a task queue an operator reports an error no earlier
    except RuntimeError:
        return False
    return True


def fusion_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id) -> torch.Tensor:
    """NPU: fused attention in TND layout; cumulative lengths are host integers, so that nothing waits.

    TND needs a training call and Atlas A2 or later; elsewhere attention is padded.
    Source: torch_npu 2.13 `npu_fusion_attention`.
    """
    if not has_packed_npu_attention():
        return padded_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id)
    import torch_npu

    PATHS_TAKEN.add("packed: npu_fusion_attention, TND")
    ends = layout.cu_seq_lens[1:]
    return torch_npu.npu_fusion_attention(
        query,
        key,
        value,
        query.shape[1],
        "TND",
        scale=1.0 / math.sqrt(query.shape[-1]),
        keep_prob=1.0 - (drop if dropout_masks is not None else 0.0),
        actual_seq_qlen=tuple(range(1, len(ends) + 1)) if first_only else ends,
        actual_seq_kvlen=ends,
    )[0]


ATTENTION: dict[str, Callable[..., torch.Tensor]] = {
    "cpu": block_attention,
    "cuda": varlen_attention,
    "npu": fusion_attention,
}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    first_only: bool,
    drop: float,
    dropout_masks: DropoutMasks | None,
    mask_id: int,
) -> torch.Tensor:
    """Attention within each sequence of the packed batch.

    Args:
        query: `[tokens, heads, dim]`, or `[sequences, heads, dim]` with `first_only`.
        key, value: `[tokens, heads, dim]`.
        layout: cumulative lengths of the sequences, on the host.
        first_only: whether only the first token of each sequence has a query.
        drop: dropout of attention probabilities, in [0, 1].
        dropout_masks: None turns dropout off.
        mask_id: number of this dropout within the model.

    Returns:
        A tensor with the shape of `query`.
    """
    if dropout_masks is not None and drop >= 1.0:
        return torch.zeros_like(query)  # every probability is dropped; 1 / (1 - drop) has no value
    function = ATTENTION.get(query.device.type, padded_attention)
    return function(query, key, value, layout, first_only, drop, dropout_masks, mask_id)


class BlockAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(dim)) v, block by block; the arguments are those of `attend`."""

    @staticmethod
    def forward(ctx, query, key, value, layout, first_only, drop, dropout_masks, mask_id):
        heads, dim = query.shape[1:]
        scale = 1.0 / math.sqrt(dim)
        drop = drop if dropout_masks is not None else 0.0
        q_rows = layout.head_rows(heads, first_only)
        k_rows = layout.head_rows(heads, False)
        saved = []
        out = _block_buffer(query, q_rows)
        for number, block in enumerate(layout.blocks):
            BLOCK_SHAPES.add(block.shape)
            q = _gathered(query, q_rows, number)
            k = _gathered(key, k_rows, number)
            v = _gathered(value, k_rows, number)
            probabilities = _softmax_block(q, k, block, first_only, scale)
            keep, dropped = None, probabilities
            if drop > 0.0:
                shape = (len(block.tokens), heads, *probabilities.shape[1:])
                keep = dropout_masks.keep(shape, drop, mask_id * 4096 + number).flatten(0, 1)
                dropped = as_numbers(keep, q.dtype).mul_(probabilities).mul_(1 / (1 - drop))
            torch.bmm(dropped, v, out=_part(out, q_rows, number, q))
            # The mask is kept in bytes, a quarter of the size of the dropped probabilities in fp32. Backward computes
            # those again in one pass.
            saved += [q, k, v, probabilities, keep]
        ctx.save_for_backward(*saved)
        ctx.layout = layout
        ctx.first_only = first_only
        ctx.scale = scale
        ctx.drop = drop
        return out.index_select(0, q_rows.of_row).view(query.shape)

    @staticmethod
    def backward(ctx, grad):
        layout, scale = ctx.layout, ctx.scale
        heads, dim = grad.shape[1:]
        q_rows, k_rows = layout.head_rows(heads, ctx.first_only), layout.head_rows(heads, False)
        # Read once: under gradient checkpointing every access unpacks the tensors, and torch refuses the second.
        saved = ctx.saved_tensors
        dq, dk, dv = (_block_buffer(grad, head_rows) for head_rows in (q_rows, k_rows, k_rows))
        for number in range(len(layout.blocks)):
            q, k, v, probabilities, keep = saved[5 * number : 5 * number + 5]
            g = _gathered(grad, q_rows, number)
            # Cells without a token repeat the first token's gradient, which would then count once for each cell.
            g.view(-1, dim).index_fill_(0, q_rows.empty(number), 0.0)
            dp = torch.bmm(g, v.transpose(1, 2))
            dropped = probabilities
            if keep is not None:
                kept = as_numbers(keep, q.dtype).mul_(1 / (1 - ctx.drop))
                dropped = probabilities * kept
                dp.mul_(kept)
            torch.bmm(dropped.transpose(1, 2), g, out=_part(dv, k_rows, number, k))
            ds = torch._softmax_backward_data(dp, probabilities, -1, q.dtype)
            _scaled_product(_part(dq, q_rows, number, q), ds, k, scale)
            _scaled_product(_part(dk, k_rows, number, k), ds.transpose(1, 2), q, scale)
        pairs = ((dq, q_rows), (dk, k_rows), (dv, k_rows))
        return *(d.index_select(0, head_rows.of_row).view(-1, heads, dim) for d, head_rows in pairs), *([None] * 5)


def _gathered(x: torch.Tensor, head_rows: HeadRows, number: int) -> torch.Tensor:
    """`[n, heads, dim]` -> `[rows * heads, width, dim]`, of one block.

    Rows of one head are copied whole, also out of the joint product of query, key and value: a fifth of the time that
    an index over tokens and heads takes.
    """
    heads, dim = x.shape[1:]
    if x.stride(1) != dim or x.stride(2) != 1 or x.stride(0) % dim:
        x = x.contiguous()
    pitch = x.stride(0) // dim
    by_head = x.as_strided(((len(x) - 1) * pitch + heads, dim), (dim, 1))
    rows, width = head_rows.count(number)
    return by_head.index_select(0, head_rows.index(number, pitch)).view(rows * heads, width, dim)


def _block_buffer(like: torch.Tensor, head_rows: HeadRows) -> torch.Tensor:
    """Memory of all blocks, `[rows of a head, dim]`, which one `index_select` then puts back into token order."""
    rows = like.new_empty(head_rows.rows, like.shape[-1])
    rows[-1] = 0.0  # what filler gets: it is in no block
    return rows


def _part(rows: torch.Tensor, head_rows: HeadRows, number: int, like: torch.Tensor) -> torch.Tensor:
    """One block's part of `_block_buffer`, `[rows * heads, width, dim]`."""
    return rows[slice(*head_rows.bounds[number])].view(like.shape)


def _scaled_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def _softmax_block(
    q: torch.Tensor, k: torch.Tensor, block: AttentionBlock, first_only: bool, scale: float
) -> torch.Tensor:
    scores = _scaled_product(q.new_empty(len(q), q.shape[1], k.shape[1]), q, k.transpose(1, 2), scale)
    hidden = block.hidden_keys(first_only)
    if hidden is not None:
        # In place: scores of `[rows * heads, width, width]` are the largest tensor of a layer.
        scores.view(len(hidden), -1, *scores.shape[1:]).masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)
