"""The O-level of a run, chosen from the flags and checked against the device and apex, and the errors of divergence.

| level | model | BatchNorm | masters | default scale | casts |
|---|---|---|---|---|---|
| O0 | fp32 | fp32 | - | 1 | - |
| O1 | fp32 | fp32 | - | 1024 | autocast |
| O2 | fp16 or bf16, LayerNorm too | fp32 | fp32 | 1024 | logits go to fp32 |
| O3 | fp16 or bf16 | as the model | none | 1 | logits go to fp32 |

Semantics and constants are those of apex (`apex.amp`, removed upstream in 2025). The default scale of O1 and O2 is
that of the reference. bf16 is our extension and needs no scale. A static scale never skips an update: a gradient that
is not finite stops the run before the update.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol

import torch
from torch import nn

from bert_glue.config.arguments import Arguments
from bert_glue.devices import cpu
from bert_glue.devices.device import Device
from bert_glue.errors import DivergedError, MachineError, UsageError
from bert_glue.precision.flat_buffers import GradientBuffers, NamedGroup

# fp16 loses gradients below 6e-8. A factor of 1024 lifts those above 6e-11 into its range; gradients above 64 then
# overflow (the largest fp16 number is 65504). A static scale costs the host no wait.
_REFERENCE_SCALE = 1024.0
USE_NATIVE = "leave --amp_backend out: the native levels are the same"


@dataclass(frozen=True)
class PrecisionPlan:
    """The precision of a run.

    Args:
        level: O0 to O3.
        dtype: dtype in which matrix products are computed.
        loss_scale: static scale, > 0; None for a dynamic one.
        note: the fallback that the run took, repeated in every output; "" if none.
        backend: native or apex.
    """

    level: str
    dtype: torch.dtype
    loss_scale: float | None
    note: str = ""
    backend: str = "native"

    @property
    def name(self) -> str:
        """Such as "O2 fp16, loss scale 1024"."""
        short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]
        name = f"{self.level} {short}"
        if self.dtype == torch.float16 and self.loss_scale != 1.0:
            name += ", loss scale " + ("dynamic" if self.loss_scale is None else f"{self.loss_scale:g}")
        return name + (", apex" if self.backend == "apex" else "")


class ModelPrecision(Protocol):
    """A module's parameters at one O-level. A forward pass needs no more; `InferencePrecision` offers no more."""

    plan: PrecisionPlan

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""


class TrainingPrecision(ModelPrecision, Protocol):
    """Parameters, gradients and loss scale of a training run; `NativePrecision` and `ApexPrecision` implement it.

    One optimizer step is `zero_gradients`, `backward` for each pass, the all_reduce of `summed`, `gather_gradients`
    and `step`, in this order.

    Attributes:
        groups: parameters that share a weight decay and a learning rate.
        summed: buffers that are added over the ranks after the last pass.
        masters: tensors that the optimizer updates, in the order of `groups`.
        scale: current loss scale.
        skipped_steps: number of updates skipped so far because of an overflow.
    """

    groups: list[NamedGroup]
    summed: GradientBuffers
    skipped_steps: int

    @property
    def masters(self) -> list[torch.Tensor]:
        """The tensors that the optimizer updates, in the order of `groups`."""

    @property
    def scale(self) -> float:
        """The current loss scale."""

    def optimizer_groups(self, per_parameter: bool) -> list[tuple[list[nn.Parameter], bool]]:
        """The parameters that an optimizer updates, with gradients: (parameters, whether they are decayed) a group."""

    def attach(self, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
        """Register the optimizer over `optimizer_groups`, None for evaluation alone; return the one to use."""

    def describe(self) -> str:
        """A line for the log on how gradients are stored."""

    def zero_gradients(self) -> None:
        """Clear every buffer that a step adds to."""

    def backward(self, loss: torch.Tensor | None, is_last: bool = True) -> None:
        """Computes the gradients of one forward pass. `loss` is None if this rank has no sample in the pass."""

    def gather_gradients(self) -> torch.Tensor:
        """The L2 norm of the step's gradients on all ranks, unscaled, 0-d fp32."""

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float) -> bool:
        """Clip and update; return False where an overflow skips the step."""

    def check_finite(self) -> None:
        """Raise DivergedError if a weight, or a gradient under a static scale, is not finite."""

    def named_masters(self) -> dict[str, torch.Tensor]:
        """The fp32 masters by parameter name; empty where the model itself holds every digit."""

    def load_masters(self, values: list[torch.Tensor]) -> None:
        """Restore a copy of `masters`, in the model too."""

    def scale_state(self) -> dict:
        """The numbers of the loss scale, for a checkpoint."""

    def load_scale_state(self, state: dict) -> None:
        """Restore what `scale_state` returned."""


def plan_precision(args: Arguments, device: Device) -> PrecisionPlan:
    """The precision that the flags request, checked against the device.

    Raises:
        MachineError: the device cannot train at this precision and `--fallback_precision` is none, or the flags
            request apex and it cannot do what they need.
        UsageError: `--adam_epsilon` is 0 in the precision of the update.
    """
    level = chosen_level(args, device)
    fp32 = torch.float32
    if not (args.fp16 or args.bf16):
        return PrecisionPlan("O0", fp32, 1.0)
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    short = "fp16" if args.fp16 else "bf16"
    # Some devices emulate a 16-bit dtype: they would train, but slower than in fp32. The user decides, not the device.
    if level != "O0" and not device.supports(dtype):
        if args.fallback_precision == "fp32":
            note = f"this device has no native {short}: trained in fp32 (O0) instead of {short} {level}"
            if args.fp16 and device.is_host and cpu.has_bf16_products():
                note += "; its fast 16-bit format is bf16 (--bf16)"
            return PrecisionPlan("O0", fp32, 1.0, note)
        other = "no precision flag (fp32)" if args.bf16 else "--bf16, no precision flag (fp32)"
        raise MachineError(
            f"--{short}: this device has no native support for it ({device.name}); "
            f"choose {other}, or --fallback_precision fp32"
        )
    # apex is loaded here so that an unusable one fails with the name of its flag, and not in the first step.
    if args.amp_backend == "apex":
        load_amp(args.use_combine_grad)
    backend = "apex" if args.amp_backend == "apex" else "native"
    if level == "O0":
        return PrecisionPlan("O0", fp32, 1.0, backend=backend)
    if backend == "apex" and level == "O3" and args.do_train:
        _check_epsilon(args)
    # bf16 has the exponent range of fp32, so that no gradient underflows that a scale would save.
    return PrecisionPlan(level, dtype, 1.0 if args.bf16 else _scale(args), backend=backend)


def chosen_level(args: Arguments, device: Device) -> str:
    """`--fp16_opt_level`; without it, `--bf16` means O2 on devices that prefer a 16-bit model to autocast."""
    if args.bf16 and args.is_default("fp16_opt_level") and device.prefers_low_precision_model:
        return "O2"
    return args.fp16_opt_level


_LARGEST_FP16_ZERO = 2.0**-25  # up to here, fp16 rounds to 0


def _check_epsilon(args: Arguments) -> None:
    """Refuse an epsilon that fp16 has not. The optimizer then divides a mean of 0 by 0, and small ones by next to 0.

    Only apex updates fp16 weights in fp16: the native O3 computes the update in fp32.
    """
    if args.adam_epsilon <= _LARGEST_FP16_ZERO and args.optim != "adafactor":
        raise UsageError(
            f"--adam_epsilon {args.adam_epsilon:g} is 0 in fp16, in which --amp_backend apex --fp16_opt_level O3 "
            "computes the update: a gradient of 0 makes a weight NaN. Give a larger one, such as --adam_epsilon 1e-4; "
            "or --fp16_opt_level O2, which updates fp32 weights; or leave out --amp_backend"
        )


def _scale(args: Arguments) -> float | None:
    """The static scale, or None for a dynamic one; the level's default without the flag."""
    # O3 is apex's "pure fp16" baseline and has no scale: what underflows there is lost.
    if args.loss_scale is None:
        return 1.0 if args.fp16_opt_level == "O3" else _REFERENCE_SCALE
    return None if args.loss_scale == "dynamic" else float(args.loss_scale)


def load_amp(needs_combine_grad: bool) -> ModuleType:
    """Import `apex.amp`.

    Args:
        needs_combine_grad: whether `--use_combine_grad` is set.

    Raises:
        MachineError: apex is absent, broken, has no amp, or its amp has no combine_grad. The message names the fix.
    """
    # The search comes before the import, because an absent apex and a broken one need different advice.
    if find_spec("apex") is None:
        raise MachineError(f"--amp_backend apex: apex is not installed; install Ascend's apex, or {USE_NATIVE}")
    try:
        has_amp = find_spec("apex.amp") is not None
        if has_amp:
            from apex import amp
    except Exception as error:  # an apex built for another torch fails in many ways
        raise MachineError(f"--amp_backend apex: apex cannot be imported ({error}); {USE_NATIVE}") from error
    if not has_amp:
        raise MachineError(f"--amp_backend apex: this apex has no amp, which NVIDIA removed in 2025-05; {USE_NATIVE}")
    if needs_combine_grad and not takes_combine_grad(amp):
        raise MachineError(
            f"--use_combine_grad: this apex has no combine_grad, only Ascend's has; leave the flag out, or {USE_NATIVE}"
        )
    return amp


def takes_combine_grad(amp: ModuleType) -> bool:
    """True for Ascend's amp, which can store all gradients in one buffer."""
    return "combine_grad" in inspect.signature(amp.initialize).parameters


# Overflows in a row. 24 halvings lead from the largest loss scale to the smallest; the rest are steps at the smallest.
MOST_OVERFLOWS = 30
BAD_GRADIENTS = (
    "gradients are not finite (NaN or Inf); the update was not made and nothing was saved since: "
    "lower --learning_rate, check the data, or use --loss_scale dynamic with --fp16"
)


def too_many_overflows(count: int, scale: float) -> str:
    """The error of a run that overflows at every loss scale."""
    return (
        f"gradients overflowed {count} times in a row, at last with loss scale {scale:g}: "
        "lower --learning_rate, or train with --bf16 or in fp32"
    )


def check_weights(masters: list[torch.Tensor]) -> None:
    """Raise DivergedError if a weight is not finite."""
    # The host waits for the device once per tensor, so callers check only when they log, evaluate or save.
    if not all(torch.isfinite(master).all() for master in masters):
        raise DivergedError("weights are not finite (NaN or Inf), and were not saved; lower --learning_rate")
