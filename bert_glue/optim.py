"""Optimizers by their names in the field, and the learning-rate schedules.

Element-wise optimizers (the Adam family) work on flat buffers. LAMB and Adafactor look at whole
parameters and get one view a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bert_glue.arguments import Arguments
from bert_glue.errors import MachineError
from bert_glue.flat import FlatGroup
from bert_glue.npu_optim import NoFusedOptimizer, npu_fused_adamw

_WHOLE_PARAMETER = ("adafactor", "lamb")
_FUSED_NPU = ("adamw_torch_npu_fused", "adamw_apex_fused_npu")  # Ascend apex's own steps under its amp only
_FUSED = ("adamw_torch_fused", "adamw_apex_fused", *_FUSED_NPU)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2) with bias correction.

    Args:
        params: parameters or groups of them.
        lr: learning rate per step, >= 0.
        betas, eps, weight_decay: as in AdamW.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of all parameters with a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                t = state["step"].item()
                mean = state["exp_avg"].lerp_(p.grad, 1 - beta1)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt_().add_(group["eps"]))
                update.add_(p, alpha=group["weight_decay"])
                weight_norm, update_norm = p.norm(), update.norm()
                trust = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
                p.sub_(update * (trust * group["lr"]))


def is_elementwise(name: str) -> bool:
    """True if an optimizer gives the same result on one flat buffer as on its parameters."""
    return name not in _WHOLE_PARAMETER


def build_optimizer(
    args: Arguments, groups: list[FlatGroup], buffers: list[torch.Tensor], grads: list[torch.Tensor]
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer of `--optim` over fp32 masters or the parameters themselves.

    Args:
        groups: layout of the buffers.
        buffers: what is updated, `[elements]` each, one a group.
        grads: their gradients, `[elements]` each.

    Returns:
        The optimizer, and what was really used, for the log.

    Raises:
        MachineError: `--strict_optim` and the named optimizer is not available here.
    """
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if is_elementwise(args.optim):
        params = []
        for group, buffer, grad in zip(groups, buffers, grads, strict=True):
            leaf = torch.nn.Parameter(buffer, requires_grad=True)
            leaf.grad = grad
            params.append({"params": [leaf], "weight_decay": args.weight_decay if group.is_decayed else 0.0})
        return _adamw(args, params, options)
    params = []
    for group, buffer, grad in zip(groups, buffers, grads, strict=True):
        leaves = []
        for value, gradient in zip(group.views(buffer).values(), group.views(grad).values(), strict=True):
            leaf = torch.nn.Parameter(value)
            leaf.grad = gradient
            leaves.append(leaf)
        params.append({"params": leaves, "weight_decay": args.weight_decay if group.is_decayed else 0.0})
    if args.optim == "lamb":
        return Lamb(params, **options), "lamb"
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=args.learning_rate, scale_parameter=False, relative_step=False), "adafactor"


def _adamw(args: Arguments, params: list[dict], options: dict) -> tuple[torch.optim.Optimizer, str]:
    """torch's AdamW, fused where the device has it; bias correction is always on."""
    wants_fused = args.optim in _FUSED
    if args.optim in _FUSED_NPU and not (args.strict_optim and args.optim == "adamw_apex_fused_npu"):
        try:
            return npu_fused_adamw(params, **options), "adamw_torch_npu_fused"
        except NoFusedOptimizer as error:
            if args.strict_optim:
                raise MachineError(f"--optim {args.optim} --strict_optim: {error}") from error
    if args.strict_optim and args.optim in _FUSED[1:]:
        raise MachineError(f"--optim {args.optim} --strict_optim: not available here; adamw_torch_fused is")
    used = "adamw_torch_fused" if wants_fused else "adamw_torch"
    try:
        optimizer = torch.optim.AdamW(params, fused=wants_fused, **options)
    except RuntimeError:  # no fused kernel for this device
        optimizer, used = torch.optim.AdamW(params, foreach=True, **options), "adamw_torch (foreach)"
    return optimizer, used


def schedule(name: str, total_steps: int, warmup_steps: float) -> Callable[[int], float]:
    """Factor of the learning rate at each optimizer step, in [0, 1].

    Args:
        name: linear, cosine, constant or constant_with_warmup.
        total_steps: optimizer steps of the run, >= 1.
        warmup_steps: steps of linear warm-up; below 1 a share of `total_steps`.

    Returns:
        A function of the number of updates done before the step.
    """
    warmup = math.ceil(total_steps * warmup_steps) if warmup_steps < 1 else int(warmup_steps)
    if name == "constant":
        return lambda step: 1.0

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if name == "linear":
            return 1.0 - progress
        return 0.5 * (1.0 + math.cos(math.pi * progress)) if name == "cosine" else 1.0

    return factor
