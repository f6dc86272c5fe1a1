"""Attention over the sequences of a packed batch: one function a device, chosen by `attend`.

Every function takes `query [queries, heads, dim]`, `key` and `value [tokens, heads, dim]`. Either every token has a
query (`queries == tokens`), or only the first token of each sequence has one (`queries == sequences`), which is all
that the last layer of a classifier needs. A new device needs one more function and its entry in `ATTENTION`.

A layout may have a window, beyond which a query sees no key. Every kernel then takes it, or its fallback does: the
blocks of `AttentionBlock`, whose memory grows with the length alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from bert_glue.data.packing import PackedLayout, width_bucket
from bert_glue.devices.device import has_slow_products
from bert_glue.devices.npu import torch_npu_of
from bert_glue.errors import first_line
from bert_glue.model.kernels.blocks import BLOCK_SHAPES, BlockAttention
from bert_glue.model.kernels.padded import first_token_attention, sdpa_blocks
from bert_glue.model.layers import DropoutMasks
from bert_glue.model.shape import EncoderShape

# The kernels that have computed attention in this process; fallbacks have names of their own.
PATHS_TAKEN: set[str] = set()
# Rows longer than this take torch's fused kernel in training too, where no probability is dropped: from here on the
# memory of probabilities, which grows with the square of the length, counts for more than the time.
_FUSED_FROM = 1024
# The side of the mask that npu_fusion_attention wants for a band, whatever the lengths are.
_BAND_MASK = 2048


def block_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id) -> torch.Tensor:
    """CPU: one batched product a block, of sequences of similar length or of rows that short ones share."""
    PATHS_TAKEN.add("packed: blocks of rows")
    dtype, kind = query.dtype, query.device.type
    # Gradients and our dropout masks need the probabilities in memory. Evaluation uses a kernel that writes none.
    drops = dropout_masks is not None and drop > 0.0
    is_long = max(layout.lengths) > _FUSED_FROM
    fused = not drops and layout.window is None and (is_long or not torch.is_grad_enabled())
    attention = _fused if fused else BlockAttention.apply
    if not has_slow_products(kind, dtype):
        return attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id)
    with torch.autocast(kind, enabled=False):
        # Three copies of `[tokens, hidden]` in fp32 cost less than torch's own 16-bit loops on such a CPU.
        query, key, value = query.float(), key.float(), value.float()
        return attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id).to(dtype)


def least_bytes(shape: EncoderShape, longest: int, element: int, is_checkpointed: bool) -> int:
    """Memory on a CPU, in bytes, that training takes at least for the attention probabilities of one row.

    Args:
        longest: tokens of the row.
        element: bytes of one probability.
        is_checkpointed: `--gradient_checkpointing`, which keeps those of one layer at a time.
    """
    drops = shape.attention_dropout > 0
    if not drops and not shape.has_relative_scores and longest > _FUSED_FROM:
        return 0
    # The last layer of a classifier has one query a row where the head reads first tokens alone. Layers with a window
    # are left out: theirs grows with the length alone.
    layers = shape.layers - (1 if shape.pooling == "first" else 0)
    kept = sum(shape.window(layer) is None for layer in range(layers))
    if kept == 0:
        return 0
    # One matrix of all pairs of tokens a head and layer, one byte more for its dropout mask, and the gradient of one.
    pairs = shape.heads * longest * longest
    return pairs * ((1 if is_checkpointed else kept) * (element + drops) + element)


def _fused(query, key, value, layout, first_only, *_) -> torch.Tensor:
    """As `BlockAttention`, by torch's fused kernel, which writes no probabilities.

    Neighbours of equal length already form a block, so that nothing is gathered, padded or masked. Evaluation batches
    are sorted by length, which makes such runs long.
    """
    found = []
    for first, end in layout.runs:
        tokens = slice(layout.cu_seq_lens[first], layout.cu_seq_lens[end])
        q_rows = slice(first, end) if first_only else tokens
        parts = query[q_rows], key[tokens], value[tokens]
        q, k, v = (part.unflatten(0, (end - first, -1)).transpose(1, 2) for part in parts)
        found.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    filler = len(query) - sum(map(len, found))  # in no run
    return torch.cat([*found, query.new_zeros(filler, *query.shape[1:])])


def padded_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id) -> torch.Tensor:
    """Any device: padded inside attention only, to a width that recurs, through torch's fused kernel.

    It is used if no kernel takes cumulative lengths, or if that kernel has no dropout. Only the first token of filler
    is computed, because the width of the whole filler changes with every batch.
    """
    if layout.window is not None:
        PATHS_TAKEN.add("blocks with a window: no packed kernel takes this dtype, dropout or device")
        return sdpa_blocks(query, key, value, layout, drop if dropout_masks else 0.0)
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


def _flash_kernel(*given, window=None):
    # varlen_attn calls this operator too, but is itself one in Python: it costs the host 0.5 ms more a call, and has no
    # dropout (torch 2.13, torch/nn/attention/varlen.py).
    sides = {} if window is None else {"window_size_left": window, "window_size_right": window}
    return torch.ops.aten._flash_attention_forward(*given, False, False, **sides)[0]


def _varlen_kernel(query, key, value, q_cu_seqlens, k_cu_seqlens, q_longest, k_longest, drop, window=None):
    from torch.nn.attention.varlen import varlen_attn

    sides = {} if window is None else {"window_size": (window, window)}
    return varlen_attn(query, key, value, q_cu_seqlens, k_cu_seqlens, q_longest, k_longest, **sides)


def _flash_attn_kernel(*given, window=None):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(*given, **({} if window is None else {"window_size": (window, window)}))


def _efficient_kernel(query, key, value, q_cu_seqlens, k_cu_seqlens, q_longest, k_longest, drop, window=None):
    # Flash computes in 16 bits and on Ampere or later. This one takes fp32 and older chips, and has no window.
    if window is not None:
        raise ValueError("it has no window to both sides")
    # Its backward refuses a bound above the number of rows, and the bound of a recording can be above it.
    longest = min(q_longest, len(query)), min(k_longest, len(key))
    batches = query[None], key[None], value[None]
    given = (*batches, None, q_cu_seqlens, k_cu_seqlens, *longest, drop, 0, True)  # no bias, no mask, for a backward
    return torch.ops.aten._efficient_attention_forward(*given)[0].squeeze(0)


# name -> (function of query, key, value, both cu_seqlens `[sequences + 1]` int32, both longest, dropout and the tokens
# seen to both sides; has dropout).
# The first one that runs is used. Their speeds have not been compared on a GPU yet.
CUDA_KERNELS: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    "torch's flash kernel": (_flash_kernel, True),
    "torch's varlen kernel": (_varlen_kernel, False),
    "flash_attn's varlen kernel": (_flash_attn_kernel, True),
    "torch's efficient kernel": (_efficient_kernel, True),
}
# Why each kernel does not run, where none does; lines for the log.
REFUSALS: dict[str, str] = {}


def runs_here(
    name: str, device: torch.device, dtype: torch.dtype, dim: int, drop: float, window: int | None = None
) -> bool:
    """True if a kernel of `CUDA_KERNELS` runs here; the arguments are those of `why_not`."""
    return why_not(name, device, dtype, dim, drop, window) is None


def why_not(
    name: str, device: torch.device, dtype: torch.dtype, dim: int, drop: float, window: int | None = None
) -> str | None:
    """Why a kernel of `CUDA_KERNELS` does not run here; None if it does. A pass over two sequences decides.

    Args:
        dim: elements of one head.
        drop: dropout of attention probabilities, in [0, 1).
        window: tokens seen to both sides; None for all.
    """
    function, has_dropout = CUDA_KERNELS[name]
    if drop > 0.0 and not has_dropout:
        return f"it has no dropout ({drop:g})"
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    try:
        # The probe draws no number from the generators of the run, or a resumed run would drop other elements.
        with torch.random.fork_rng([] if device.index is None else [device], device_type=device.type):
            probe = torch.zeros(3, 1, dim, dtype=dtype, device=device, requires_grad=True)
            with torch.enable_grad():
                function(probe, probe, probe, cu_seqlens, cu_seqlens, 2, 2, drop, **_sides(window)).sum().backward()
            probe.grad.sum().item()  # the host waits here, because a device reports a failure no earlier
    except Exception as error:  # a missing package, a chip, a dtype and a size fail in different ways
        return f"{type(error).__name__}: {first_line(error)[:200]}"
    return None


def _sides(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window": window}


@cache
def cuda_kernel(
    device: torch.device, dtype: torch.dtype, dim: int, drop: float, window: int | None = None
) -> str | None:
    """Name of the kernel that this device uses for heads of `dim` elements; None if no kernel runs.

    `REFUSALS` then has the reason of each.
    """
    reasons = {}
    for name in CUDA_KERNELS:
        reason = why_not(name, device, dtype, dim, drop, window)
        if reason is None:
            return name
        reasons[name] = reason
    REFUSALS.update(reasons)
    return None


def varlen_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id) -> torch.Tensor:
    """CUDA: the first kernel of `CUDA_KERNELS` that runs; they take cu_seqlens."""
    rate = drop if dropout_masks is not None else 0.0
    name = cuda_kernel(query.device, query.dtype, query.shape[-1], rate, **_sides(layout.window))
    if name is None:
        return padded_attention(query, key, value, layout, first_only, drop, dropout_masks, mask_id)
    PATHS_TAKEN.add(f"packed: {name}")
    cu_seqlens = layout.cu_seqlens(query.device)
    q_cu_seqlens = torch.arange(len(cu_seqlens), dtype=torch.int32, device=query.device) if first_only else cu_seqlens
    q_longest = 1 if first_only else layout.longest
    given = (query, key, value, q_cu_seqlens, cu_seqlens, q_longest, layout.longest, rate)
    return CUDA_KERNELS[name][0](*given, **_sides(layout.window))


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
    ends, band = layout.cu_seq_lens[1:], {}
    if layout.window is not None:
        # Mode 4 is a band; its mask is the same triangle for all lengths (torch_npu's page of the operator).
        mask = torch.ones(_BAND_MASK, _BAND_MASK, dtype=torch.bool, device=query.device).triu_(1)
        sides = {"pre_tockens": layout.window, "next_tockens": layout.window}
        band = {"sparse_mode": 4, "atten_mask": mask, **sides}
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
        **band,
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
    if first_only and layout.window is not None:
        return first_token_attention(query, key, value, layout, drop, dropout_masks, mask_id)
    function = ATTENTION.get(query.device.type, padded_attention)
    return function(query, key, value, layout, first_only, drop, dropout_masks, mask_id)
