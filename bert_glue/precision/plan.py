"""Which O-level a run trains at: the flags checked against the device and apex; what ends a run that diverged.

| level | model | BatchNorm | masters | default scale | casts |
|---|---|---|---|---|---|
| O0 | fp32 | fp32 | - | 1 | - |
| O1 | fp32 | fp32 | - | 1024 | autocast |
| O2 | fp16 or bf16, LayerNorm too | fp32 | fp32 | 1024 | logits go to fp32 |
| O3 | fp16 or bf16 | as the model | none | 1 | logits go to fp32 |

Semantics and constants are apex's (`apex.amp`, removed upstream in 2025); the default scale of O1 and O2
is the reference's; bf16 is our extension and needs no scale. Under a static scale nothing is ever
skipped: a gradient that is not finite stops the run before the update.
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
from bert_glue.devices.device import Device
from bert_glue.errors import DivergedError, MachineError
from bert_glue.precision.flat_buffers import GradientBuffers, NamedGroup

_REFERENCE_SCALE = 1024.0
USE_NATIVE = "leave --amp_backend out: the native levels are the same"


@dataclass(frozen=True)
class PrecisionPlan:
    """What was decided for a run.

    Args:
        level: O0 to O3.
        dtype: that products are computed in.
        loss_scale: static scale, or None for dynamic.
        note: a fallback that was taken, for every output; "" if none.
        backend: native, or apex.
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
    """A module's parameters at one O-level, which is all that a forward pass needs, and all of `InferencePrecision`."""

    plan: PrecisionPlan

    def autocast(self) -> AbstractContextManager:
        """Context of a forward pass."""


class TrainingPrecision(ModelPrecision, Protocol):
    """Parameters, gradients and the loss scale of a training run: `NativePrecision` and `ApexPrecision`.

    One optimizer step is `zero_gradients`, `backward` for each pass, the all_reduce of `summed`, `gather_gradients`
    and `step`, in this order.

    Attributes:
        groups: parameters that share a weight decay and a learning rate.
        summed: what has to be added over ranks after the last pass.
        masters: what the optimizer updates, in the order of `groups`.
        scale: loss scale now.
        skipped_steps: updates skipped for overflow so far.
    """

    groups: list[NamedGroup]
    summed: GradientBuffers
    skipped_steps: int

    @property
    def masters(self) -> list[torch.Tensor]:
        """What the optimizer updates, in the order of `groups`."""

    @property
    def scale(self) -> float:
        """Loss scale now."""

    def optimizer_groups(self, per_parameter: bool) -> list[tuple[list[nn.Parameter], bool]]:
        """What an optimizer updates, with gradients: (parameters, whether they are decayed) a group."""

    def attach(self, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
        """Take note of the optimizer over `optimizer_groups`, None for evaluation alone; returns the one to use."""

    def describe(self) -> str:
        """How gradients are kept, one line for the log."""

    def zero_gradients(self) -> None:
        """Clear all that a step adds to."""

    def backward(self, loss: torch.Tensor | None, is_last: bool = True) -> None:
        """Gradients of one forward pass; `loss` is None where this rank has no sample in it."""

    def gather_gradients(self) -> torch.Tensor:
        """L2 norm of the step's gradients on all ranks, without the scale, 0-d fp32."""

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float) -> bool:
        """Clip and update; False where the step was skipped for overflow."""

    def check_finite(self) -> None:
        """Raises DivergedError if a weight, or a gradient under a static scale, is not finite."""

    def named_masters(self) -> dict[str, torch.Tensor]:
        """fp32 masters under their parameters' names; empty where the model has all there is."""

    def load_masters(self, values: list[torch.Tensor]) -> None:
        """Take back a copy of `masters`, into the model too."""

    def scale_state(self) -> dict:
        """Numbers of the loss scale, for a checkpoint."""

    def load_scale_state(self, state: dict) -> None:
        """Take back `scale_state`."""


def plan_precision(args: Arguments, device: Device) -> PrecisionPlan:
    """The precision asked for, checked against the device.

    Raises:
        MachineError: the device cannot train so and `--fallback_precision` is none; or apex is asked
            for and cannot do it.
    """
    level = args.fp16_opt_level
    fp32 = torch.float32
    if not (args.fp16 or args.bf16):
        return PrecisionPlan("O0", fp32, 1.0)
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    short = "fp16" if args.fp16 else "bf16"
    if level != "O0" and not device.supports(dtype):
        if args.fallback_precision == "fp32":
            note = f"this device has no native {short}: trained in fp32 (O0) instead of {short} {level}"
            return PrecisionPlan("O0", fp32, 1.0, note)
        other = "no precision flag (fp32)" if args.bf16 else "--bf16, no precision flag (fp32)"
        raise MachineError(
            f"--{short}: this device has no native support for it ({device.name}); "
            f"choose {other}, or --fallback_precision fp32"
        )
    # Loaded here to be refused here, with the flag that asks for it, and not in the first step.
    if args.amp_backend == "apex":
        load_amp(args.use_combine_grad)
    backend = "apex" if args.amp_backend == "apex" else "native"
    if level == "O0":
        return PrecisionPlan("O0", fp32, 1.0, backend=backend)
    # bf16 has the exponents of fp32: nothing underflows that a scale would save.
    return PrecisionPlan(level, dtype, 1.0 if args.bf16 else _scale(args), backend=backend)


def _scale(args: Arguments) -> float | None:
    """The static scale, None for dynamic; a level's own where the flag was not given."""
    if args.loss_scale is None:
        return 1.0 if args.fp16_opt_level == "O3" else _REFERENCE_SCALE
    return None if args.loss_scale == "dynamic" else float(args.loss_scale)


def load_amp(needs_combine_grad: bool) -> ModuleType:
    """`apex.amp`.

    Args:
        needs_combine_grad: `--use_combine_grad` was given.

    Raises:
        MachineError: apex is absent, broken, has no amp, or its amp has no combine_grad; with the fix.
    """
    # Looked for before it is imported: an import of a broken apex and the absence of one need different advice.
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
    """True for Ascend's amp, whose gradients can lie in one buffer."""
    return "combine_grad" in inspect.signature(amp.initialize).parameters


MOST_OVERFLOWS = 30  # in a row; from the largest loss scale to the smallest are 24
BAD_GRADIENTS = (
    "gradients are not finite (NaN or Inf); the update was not made and nothing was saved since: "
    "lower --learning_rate, check the data, or use --loss_scale dynamic with --fp16"
)


def too_many_overflows(count: int, scale: float) -> str:
    """The line that ends a run whose dynamic scale finds no bottom."""
    return (
        f"gradients overflowed {count} times in a row, at last with loss scale {scale:g}: "
        "lower --learning_rate, or train with --bf16 or in fp32"
    )


def check_weights(masters: list[torch.Tensor]) -> None:
    """Raises DivergedError if a weight is not finite; waits for the device."""
    if not all(torch.isfinite(master).all() for master in masters):
        raise DivergedError("weights are not finite (NaN or Inf); nothing was saved since: lower --learning_rate")
