"""The NPU's fused AdamW: one update over one buffer, where torch_npu has it.

torch_npu's class moves parameters and gradients into a combined buffer at its first step and steps on that
buffer from then on. So gradients are only ever overwritten here, never dropped: after
`zero_grad(set_to_none=True)` it would go on stepping on the last gradients it saw. The optimizer owns
the memory of the parameters; it has to live as long as they do (`Run` holds both).
Source: torch_npu 2.13, `torch_npu/optim/npu_fused_optim_base.py`.
"""

from __future__ import annotations

import torch


class NoFusedOptimizer(Exception):
    """This machine, or these parameters, cannot have the NPU's fused optimizer; the text says why."""


def moves_allocations(optim: str, device: torch.device) -> bool:
    """True if the optimizer of `--optim` may put gradients elsewhere in a device's memory."""
    from bert_glue.device import torch_npu_of

    return optim in ("adamw_apex_fused_npu", "adamw_torch_npu_fused") and torch_npu_of(device) is not None


def npu_fused_adamw(params: list[dict], **options) -> torch.optim.Optimizer:
    """torch_npu's fused AdamW.

    Args:
        params: groups of parameters that have their gradients and whole allocations to themselves.
        options: lr, betas, eps.

    Raises:
        NoFusedOptimizer: torch_npu is not here, or cannot do it.
    """
    from bert_glue.device import torch_npu_of

    first = params[0]["params"][0]
    torch_npu = torch_npu_of(first.device)
    if torch_npu is None:
        raise NoFusedOptimizer(f"torch_npu's fused AdamW updates parameters on its own device, not on {first.device}")
    dtypes = {p.dtype for group in params for p in group["params"]}
    if not dtypes <= {torch.float32, torch.float16}:
        raise NoFusedOptimizer("torch_npu's fused AdamW takes fp32 and fp16 only")
    try:
        from torch_npu.optim import NpuFusedAdamW
    except ImportError as error:
        raise NoFusedOptimizer(f"this torch_npu has no NpuFusedAdamW ({error})") from error
    return NpuFusedAdamW(params, **options)
