"""Optimizers by the names of `--optim`, learning rates by layer, and learning-rate schedules.

Element-wise optimizers (the Adam family) update flat buffers. LAMB and Adafactor need whole parameters and get one view
per parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

import torch

from bert_glue.config.arguments import Arguments
from bert_glue.devices.npu import NoFusedOptimizer, npu_fused_adamw
from bert_glue.errors import MachineError, UsageError
from bert_glue.precision.flat_buffers import l2_norm

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
_BELOW = (
    "words.", "positions.", "types.", "task_types.", "embedding_norm.", "projection.", "relative_positions.",
    "relative_norm.",
)  # fmt: skip


def rate_factors(names: Iterable[str], decay: float, is_shared: bool) -> dict[str, float]:
    """Factor of the learning rate of each parameter, in (0, 1].

    The head and the top layer have factor 1. Each lower layer has `decay` times the factor of the layer above it, and
    the embeddings have `decay` times that of the lowest layer (Howard and Ruder 2018, arXiv 1801.06146; Zhang et al.
    2021, arXiv 2006.05987, section 6).

    Args:
        names: names of all parameters.
        is_shared: whether all layers share one set of weights.

    Raises:
        UsageError: the layers share their weights or have no numbers.
    """
    names = list(names)
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    heights = {name: _height(name) for name in names}
    known = [height for height in heights.values() if height]
    if is_shared or not known:
        raise UsageError(
            f"--layerwise_lr_decay {decay:g}: the layers of this model share their weights, or have no numbers"
        )
    return {name: 1.0 if height is None else decay ** (max(known) - height) for name, height in heights.items()}


def _height(name: str) -> int | None:
    """0 for embeddings, n for the n-th layer, None for parameters above all layers."""
    if found := _LAYER.search(name):
        return int(found[1]) + 1
    return 0 if name.startswith(_BELOW) or "embed" in name else None


# Their updates depend on norms or means of a whole parameter, which a flat buffer would mix with those of others. The
# price is a view and several launches for each parameter, instead of a few launches for all.
_WHOLE_PARAMETER = ("adafactor", "lamb")


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2) with bias correction.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, >= 0.
        betas, eps, weight_decay: as in AdamW.
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                t = state["step"].item()  # the count is on the host: no wait
                mean = state["exp_avg"].lerp_(p.grad, 1 - beta1)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                update = (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt_().add_(group["eps"]))
                update.add_(p, alpha=group["weight_decay"])
                weight_norm, update_norm = l2_norm([p]), l2_norm([update])
                # The trust ratio stays on the device; a comparison on the host would wait once a parameter.
                trust = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
                p.sub_(update * (trust * group["lr"]))


def is_elementwise(name: str) -> bool:
    """True if the optimizer gives the same result on one flat buffer as on separate parameters."""
    return name not in _WHOLE_PARAMETER


def build_optimizer(
    args: Arguments, parameter_groups: list[tuple[list[torch.nn.Parameter], bool]]
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer of `--optim`, or the nearest one that this machine has.

    Args:
        parameter_groups: (parameters, whether they are decayed) per group, from `NativePrecision.optimizer_groups`.

    Returns:
        The optimizer and its name; with the reason if it is not the requested one.

    Raises:
        MachineError: the requested optimizer is not available here, and there is no other or `--strict_optim` is set.
    """
    params = [{"params": p, "weight_decay": args.weight_decay if decayed else 0.0} for p, decayed in parameter_groups]
    absent = ""
    for name in (args.optim, *_NEAREST.get(args.optim, ())):
        try:
            optimizer = _BUILDERS[name](args, [dict(group) for group in params])
        except _Absent as error:
            absent = absent or str(error)
            if args.strict_optim:
                raise MachineError(f"--optim {name} --strict_optim: {error}") from error
            continue
        return optimizer, name if name == args.optim else f"{name} instead of {args.optim}: {absent}"
    raise MachineError(f"--optim {args.optim}: {absent}")


class _Absent(Exception):
    """This machine does not have the optimizer; the text says why."""


def _adam_options(args: Arguments) -> dict:
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _adamw_torch(args: Arguments, params: list[dict]) -> torch.optim.Optimizer:
    # foreach updates a group in a few launches, where torch's default on a CPU loops over the tensors in Python. It
    # needs temporary memory as large as the group.
    return torch.optim.AdamW(params, foreach=True, **_adam_options(args))


def _adamw_torch_fused(args: Arguments, params: list[dict]) -> torch.optim.Optimizer:
    device = params[0]["params"][0].device
    try:
        optimizer = torch.optim.AdamW(params, fused=True, capturable=bool(args.cuda_graph), **_adam_options(args))
    except RuntimeError as error:
        raise _Absent(f"torch has no fused AdamW for {device.type}") from error
    # A recorded update reads the rate from device memory: a Python number would be fixed at the first step's value.
    if args.cuda_graph:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(args.learning_rate, device=device)
    return optimizer


def set_rate(group: dict, rate: float) -> None:
    """Sets the learning rate of a group for the next step. A rate in device memory is changed in place."""
    if torch.is_tensor(group["lr"]):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors of an optimizer's state, such as moments and counts of steps."""
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


def runs_without_host(optimizer: torch.optim.Optimizer) -> bool:
    """True if a step, with its clip and its overflow check, reads all of its numbers on the device."""
    rates_there = all(torch.is_tensor(group["lr"]) for group in optimizer.param_groups)
    # torch sets this attribute on its fused optimizers. They take loss scale and overflow flag as tensors; the others
    # read them on the host, which costs a wait per step and cannot be recorded.
    return rates_there and getattr(optimizer, "_step_supports_amp_scaling", False)


def state_shapes(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor
) -> dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]:
    """The state that an optimizer keeps for a parameter after its first update: name -> (shape, possible dtypes).

    Args:
        parameter: a parameter of the optimizer, any shape.
    """
    # The real state appears only with the first update. A checkpoint is checked against these shapes before it, because
    # a fused kernel reads beyond the end of a tensor that is too short.
    shape, number = parameter.shape, torch.Size()
    own, counts = (parameter.dtype, torch.float32), (torch.float32, torch.int64)
    if type(optimizer).__name__ == "Adafactor":
        means = {"exp_avg_sq": shape}
        if len(shape) >= 2:
            means = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        return {name: (size, own) for name, size in means.items()} | {"step": (number, counts), "RMS": (number, own)}
    found = {"exp_avg": (shape, own), "exp_avg_sq": (shape, own)}
    # apex's FusedAdam counts the steps of a whole group, not of each parameter.
    return found if type(optimizer).__name__ == "FusedAdam" else found | {"step": (number, counts)}


def _of_apex(class_name: str, **options: object) -> Callable[[Arguments, list[dict]], torch.optim.Optimizer]:
    def build(args: Arguments, params: list[dict]) -> torch.optim.Optimizer:
        try:
            import apex.optimizers
        except Exception as error:  # an apex that was built for another torch fails in many ways
            raise _Absent(f"apex.optimizers cannot be imported ({error})") from error
        found = getattr(apex.optimizers, class_name, None)
        if found is None:
            raise _Absent(f"this apex has no {class_name}")
        try:
            return found(params, **_adam_options(args), **options)
        except RuntimeError as error:
            raise _Absent(f"{class_name} does not run here ({error})") from error

    return build


def _apex_fused_npu(args: Arguments, params: list[dict]) -> torch.optim.Optimizer:
    if args.amp_backend != "apex":
        raise _Absent("Ascend's apex runs it only with --amp_backend apex")
    return _of_apex("NpuFusedAdamW")(args, params)


def _torch_npu_fused(args: Arguments, params: list[dict]) -> torch.optim.Optimizer:
    try:
        return npu_fused_adamw(params, **_adam_options(args))
    except NoFusedOptimizer as error:
        raise _Absent(str(error)) from error


def _adamw_hf(args: Arguments, params: list[dict]) -> torch.optim.Optimizer:
    raise _Absent("transformers has removed it")


def _lamb(args: Arguments, params: list[dict]) -> torch.optim.Optimizer:
    return Lamb(params, **_adam_options(args))


def _adafactor(args: Arguments, params: list[dict]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(params, lr=args.learning_rate, scale_parameter=False, relative_step=False)


_BUILDERS: dict[str, Callable[[Arguments, list[dict]], torch.optim.Optimizer]] = {
    "adamw_torch": _adamw_torch,
    "adamw_torch_fused": _adamw_torch_fused,
    "adamw_apex_fused_npu": _apex_fused_npu,
    "adamw_torch_npu_fused": _torch_npu_fused,
    # adam_w_mode gives the decoupled decay of every other optimizer here; apex's default is plain Adam. set_grad_none
    # would drop the gradients, which are views of flat buffers and must keep their addresses.
    "adamw_apex_fused": _of_apex("FusedAdam", adam_w_mode=True, set_grad_none=False),
    "adamw_hf": _adamw_hf,
    "adafactor": _adafactor,
    "lamb": _lamb,
}
# Replacements of an absent optimizer, in order of preference: the same update, made by slower kernels.
_NEAREST = {
    "adamw_torch_fused": ("adamw_torch",),
    "adamw_apex_fused_npu": ("adamw_torch_npu_fused", "adamw_torch_fused", "adamw_torch"),
    "adamw_torch_npu_fused": ("adamw_torch_fused", "adamw_torch"),
    "adamw_apex_fused": ("adamw_torch_fused", "adamw_torch"),
    "adamw_hf": ("adamw_torch",),
}


def schedule(name: str, total_steps: int, warmup_steps: float) -> Callable[[int], float]:
    """The factor of the learning rate at each optimizer step, in [0, 1], as a function.

    Args:
        name: linear, cosine, constant or constant_with_warmup.
        total_steps: optimizer steps of the run, >= 1.
        warmup_steps: steps of linear warm-up; a number below 1 is a share of `total_steps`.

    Returns:
        A function of the number of updates before the step.
    """
    warmup = math.ceil(total_steps * warmup_steps) if warmup_steps < 1 else int(warmup_steps)
    if name == "constant":
        return lambda step: 1.0

    def factor(step: int) -> float:
        if step < warmup:  # as in transformers, the first step has rate 0 and changes nothing
            return step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if name == "linear":
            return 1.0 - progress
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor
