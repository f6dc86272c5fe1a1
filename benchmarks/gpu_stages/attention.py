"""Attention kernels of this device against float64, and whether their dropout is sound.

The limits are relative L2 errors, several times what the dtype's rounding gives. A wrong border, mask or scale is off
by ten percent or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from benchmarks.common import StageRows
from bert_glue.data.packing import PackedLayout
from bert_glue.devices.device import Device, resolve_device
from bert_glue.model import attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (128, 1, 37, 64, 65, 5, 128, 90)
_LIMITS = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 5e-3}
_HEADS, _DIM = 3, 64


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """L2 norm of the difference over that of `exact`."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-30))


def exact_attention(query, key, value, q_ends: list[int], k_ends: list[int]) -> torch.Tensor:
    """Attention within each sequence, one after the other; `*_ends` are cumulative lengths with the leading 0."""
    pieces = []
    for (a, b), (c, d) in zip(pairwise(q_ends), pairwise(k_ends), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) / math.sqrt(query.shape[-1])
        pieces.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[c:d]))
    return torch.cat(pieces)


def attention_errors(compute: Callable, dtype: torch.dtype, device: Device, first_only: bool) -> dict[str, object]:
    """Errors of an attention function and of its gradients against float64.

    Args:
        compute: (query, key, value, layout, first_only) -> output.
    """
    torch.manual_seed(0)
    layout, place = PackedLayout(LENGTHS), device.torch_device
    # As the encoder gives them: key and value, mostly the query too, are views of one buffer.
    joint = torch.randn(layout.tokens, 3, _HEADS, _DIM, device=place).to(dtype)
    query = torch.randn(len(LENGTHS), _HEADS, _DIM, device=place).to(dtype) if first_only else joint[:, 0]
    given = [x.detach().requires_grad_() for x in (query, joint[:, 1], joint[:, 2])]
    out = compute(*given, layout, first_only)
    weight = torch.randn(out.shape, device=place).to(dtype)
    (out * weight).sum().backward()
    exact = [x.detach().double().cpu().requires_grad_() for x in given]
    ends = list(layout.cu_seq_lens)
    expected = exact_attention(*exact, list(range(len(LENGTHS) + 1)) if first_only else ends, ends)
    (expected * weight.double().cpu()).sum().backward()
    gradients = [relative_error(x.grad, y.grad) for x, y in zip(given, exact, strict=True)]
    return {"forward": relative_error(out, expected), "gradients": gradients}


def _by_name(name: str) -> Callable:
    """A kernel of `CUDA_KERNELS` with the arguments that the encoder's attention has."""

    def compute(query, key, value, layout, first_only, drop=0.0):
        ends = layout.cu_seqlens(query.device)
        q_ends = torch.arange(len(ends), dtype=torch.int32, device=query.device) if first_only else ends
        longest = 1 if first_only else layout.longest
        return attention.CUDA_KERNELS[name][0](query, key, value, q_ends, ends, longest, layout.longest, drop)

    return compute


def _chosen(query, key, value, layout, first_only):
    return attention.attend(query, key, value, layout, first_only, 0.0, None, 0)


def check_attention(rows: StageRows) -> None:
    """Every attention kernel of this device, and the one that the encoder chooses, against float64."""
    device = resolve_device("auto")
    for precision, dtype in DTYPES.items():
        if not device.supports(dtype):
            continue
        named = [name for name in attention.CUDA_KERNELS if device.can_record and _runs(name, device, dtype, 0.0)]
        for name, compute in [("chosen", _chosen), *((name, _by_name(name)) for name in named)]:
            for first_only in (False, True):
                known = {"kernel": name, "precision": precision, "first_only": first_only}
                with rows.row("attention against float64", **known) as found:
                    attention.PATHS_TAKEN.clear()
                    found |= attention_errors(compute, dtype, device, first_only)
                    found["path"] = sorted(attention.PATHS_TAKEN)
                    found["ok"] = max(found["forward"], *found["gradients"]) < _LIMITS[precision]
            if name != "chosen" and _runs(name, device, dtype, 0.2):
                with rows.row("dropout of attention", kernel=name, precision=precision) as found:
                    found |= dropout_facts(compute, dtype, device)


def _runs(name: str, device: Device, dtype: torch.dtype, drop: float) -> bool:
    return attention.runs_here(name, device.torch_device, dtype, _DIM, drop)


def dropout_facts(compute: Callable, dtype: torch.dtype, device: Device) -> dict[str, object]:
    """Whether a kernel's dropout repeats with its seed, changes without, keeps the mean, and has the right gradient."""
    place, count = device.torch_device, 40 if device.is_host else 2000
    torch.manual_seed(1)
    few = [torch.randn(6, _HEADS, _DIM, device=place).to(dtype) for _ in range(3)]
    layout = PackedLayout((6,) * count)
    many = [x.repeat(count, 1, 1) for x in few]
    torch.manual_seed(2)
    first, second = (compute(*many, layout, False, 0.2) for _ in range(2))
    torch.manual_seed(2)
    again = compute(*many, layout, False, 0.2)
    mean = first.double().view(count, *few[0].shape).mean(0)
    # With its seed fixed the function is linear in the values, whatever the masks are: <out, w> = <v, dv>.
    given = [x.detach().requires_grad_() for x in many]
    torch.manual_seed(3)
    out = compute(*given, layout, False, 0.2)
    weight = torch.randn(out.shape, device=place).to(dtype)
    (out.float() * weight.float()).sum().backward()
    terms = out.detach().double() * weight.double()
    slope = (given[2].detach().double() * given[2].grad.double()).sum()
    found = {
        "same_seed_same_masks": torch.equal(first, again),
        "next_call_other_masks": not torch.equal(first, second),
        "mean_error": relative_error(mean, compute(*few, PackedLayout((6,)), False, 0.0)),
        "linear_in_values": float((terms.sum() - slope).abs() / terms.norm()),
    }
    # The mean of n draws of 0 or 1 / 0.8 is off by 0.5 / sqrt(n), times a factor for the spread of values.
    is_sound = found["same_seed_same_masks"] and found["next_call_other_masks"]
    return found | {"ok": is_sound and found["mean_error"] < 2 / math.sqrt(count) and found["linear_in_values"] < 2e-2}
