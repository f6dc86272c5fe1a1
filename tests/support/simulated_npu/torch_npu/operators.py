"""torch_npu's own operators, by the semantics of its documentation."""

from __future__ import annotations

import torch

from torch_npu import npu
from torch_npu.chip import CHIP, saturate
from torch_npu.tensor import CALLS, NpuTensor, on_device

_ND = 2  # the plain memory format


_BAND_MASK = (2048, 2048)  # shape of the mask that stands for any band


def _attend(query, key, value, scale, keep_prob, query_ends, key_ends, window) -> torch.Tensor:
    """softmax(q k' scale) v within each sequence and window, on host tensors `[tokens, heads, dim]`."""
    out, query_begin, key_begin = [], 0, 0
    for query_end, key_end in zip(query_ends, key_ends, strict=True):
        q, k, v = query[query_begin:query_end], key[key_begin:key_end], value[key_begin:key_end]
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        if window is not None:
            apart = torch.arange(len(q))[:, None] - torch.arange(len(k))
            scores = scores.masked_fill((apart > window[0]) | (apart < -window[1]), -torch.inf)
        probabilities = torch.dropout(scores.softmax(-1), 1.0 - keep_prob, train=keep_prob < 1.0)
        out.append(torch.einsum("hqk,khd->qhd", probabilities, v.float()).to(query.dtype))
        query_begin, key_begin = query_end, key_end
    return torch.cat(out)


class _FusionAttention(torch.autograd.Function):
    """The backward draws the same dropout mask again, as the kernel does from its seed."""

    @staticmethod
    def forward(ctx, query, key, value, *settings):
        ctx.save_for_backward(query, key, value)
        ctx.settings, ctx.seed = settings, npu.get_rng_state()
        with npu.own_generator():
            result = _attend(query.host, key.host, value.host, *settings)
        if CHIP.saturates:
            saturate(result)
        return on_device(result)

    @staticmethod
    def backward(ctx, grad):
        hosts = [x.host.detach().requires_grad_() for x in ctx.saved_tensors]
        now = npu.get_rng_state()
        npu.set_rng_state(ctx.seed)
        with torch.enable_grad(), npu.own_generator():
            result = _attend(*hosts, *ctx.settings)
        npu.set_rng_state(now)
        found = torch.autograd.grad(result, hosts, grad.host)
        return *(on_device(x) for x in found), *([None] * 5)


def npu_fusion_attention(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
    pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, softmax_layout="", sink=None,
    dropout_mask=None, seed=0, offset=0,
):  # fmt: skip
    """TND only: `[tokens, heads, dim]`, cumulative lengths as host integers without the leading 0."""
    if input_layout != "TND":
        raise NotImplementedError(f"simulated npu_fusion_attention: layout {input_layout}")
    if not CHIP.has_packed_attention:
        raise RuntimeError(f"npu_fusion_attention: {CHIP.name} does not support layout TND")
    others = (pse, padding_mask, prefix, sink, dropout_mask)
    is_band = sparse_mode == 4 and atten_mask is not None and tuple(atten_mask.shape) == _BAND_MASK
    if any(x is not None for x in others) or not (is_band or (sparse_mode == 0 and atten_mask is None)):
        raise NotImplementedError("simulated npu_fusion_attention: masks")
    if is_band and (atten_mask.dtype != torch.bool or tuple(actual_seq_qlen) != tuple(actual_seq_kvlen)):
        raise RuntimeError("npu_fusion_attention: a band wants a bool mask, and as many queries as keys")
    tensors = (query, key, value)
    if not all(isinstance(x, NpuTensor) for x in tensors) or len({x.dtype for x in tensors}) > 1:
        raise RuntimeError("npu_fusion_attention: query, key and value must be of one dtype, on the device")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or head_num != query.shape[1]:
        raise RuntimeError(f"npu_fusion_attention: {query.dtype}, {head_num} heads for {tuple(query.shape)}")
    for ends, x in ((actual_seq_qlen, query), (actual_seq_kvlen, key)):
        is_good = isinstance(ends, list | tuple) and all(type(end) is int for end in ends)
        if not is_good or ends[0] == 0 or list(ends) != sorted(ends) or ends[-1] != len(x):
            raise RuntimeError(f"npu_fusion_attention: cumulative lengths {ends} for {len(x)} tokens")
    CALLS["npu_fusion_attention.TND"] += 1
    ends = tuple(actual_seq_qlen), tuple(actual_seq_kvlen)
    window = (pre_tockens, next_tockens) if is_band else None
    return _FusionAttention.apply(query, key, value, scale, keep_prob, *ends, window), None, None, None, 0, 0, 0


def npu_get_float_status(self, mode=0):
    """The status register: a first element other than 0 means an overflow since it was cleared."""
    return torch.full_like(self, float(CHIP.has_overflowed))


def npu_clear_float_status(self, mode=0):
    """Clear the status register."""
    CHIP.has_overflowed = False
    return torch.zeros_like(self)


def get_npu_format(self):
    return _ND


def npu_format_cast(self, acl_format, customize_dtype=None, input_dtype=None):
    return self


def get_storage_size(self):
    """Elements of a tensor's allocation."""
    return self._memory.nbytes // self.element_size()


def npu_change_data_ptr(dst, src, index):
    """Let all tensors of `dst`'s allocation look into `src`'s, from element `index` on."""
    size = dst.element_size()
    if dst.dtype != src.dtype or dst.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"npu_change_data_ptr: {dst.dtype} and {src.dtype}")
    if index * size + dst._memory.nbytes > src._memory.nbytes:
        raise RuntimeError("npu_change_data_ptr: Offsets overflow")
    dst._memory.move(src._memory, index * size)
    return 0
