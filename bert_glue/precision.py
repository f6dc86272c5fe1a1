"""O0 to O3: which dtype computes, where the fp32 masters live, how the loss is scaled.

| level | model | masters | default scale | casts |
|---|---|---|---|---|
| O0 | fp32 | - | 1 | - |
| O1 | fp32 | - | as given | autocast |
| O2 | fp16 or bf16, LayerNorm too | fp32 | as given | logits go to fp32 |
| O3 | fp16 or bf16 | none | 1 | logits go to fp32 |

Semantics and constants are apex's (`apex.amp`, removed upstream in 2025); bf16 is our extension and
needs no scale. Under a static scale nothing is ever skipped: a gradient that is not finite stops the
run before the update.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from bert_glue.arguments import Arguments
from bert_glue.device import Device
from bert_glue.errors import DivergedError, MachineError
from bert_glue.flat import FlatGroup, flatten

_FIRST_SCALE, _GROWTH_STEPS, _LARGEST_SCALE = 2.0**16, 2000, 2.0**24
_SMALLEST_SCALE, _MOST_OVERFLOWS = 1.0, 50


@dataclass(frozen=True)
class PrecisionPlan:
    """What was decided for a run.

    Args:
        level: O0 to O3.
        dtype: that products are computed in.
        loss_scale: static scale, or None for dynamic.
        note: a fallback that was taken, for every output; "" if none.
    """

    level: str
    dtype: torch.dtype
    loss_scale: float | None
    note: str = ""

    @property
    def name(self) -> str:
        """Such as "O2 fp16, loss scale 1024"."""
        short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]
        if self.dtype != torch.float16 or self.loss_scale == 1.0:
            return f"{self.level} {short}"
        scale = "dynamic" if self.loss_scale is None else f"{self.loss_scale:g}"
        return f"{self.level} {short}, loss scale {scale}"


def plan_precision(args: Arguments, device: Device) -> PrecisionPlan:
    """The precision asked for, checked against the device.

    Raises:
        MachineError: the device cannot train so and `--fallback_precision` is none.
    """
    fp32 = PrecisionPlan("O0", torch.float32, 1.0)
    if not (args.fp16 or args.bf16) or args.fp16_opt_level == "O0":
        return fp32
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    asked = f"{'fp16' if args.fp16 else 'bf16'} {args.fp16_opt_level}"
    if not device.supports(dtype):
        if args.fallback_precision == "fp32":
            note = f"this device has no native {asked.split()[0]}: trained in fp32 (O0) instead of {asked}"
            return PrecisionPlan("O0", torch.float32, 1.0, note)
        raise MachineError(
            f"--{asked.split()[0]}: this device has no native support for it ({device.name}); "
            "choose --bf16, no precision flag (fp32), or --fallback_precision fp32"
        )
    if args.amp_backend == "apex":
        raise MachineError("--amp_backend apex: apex with amp is not installed here; native gives the same levels")
    if args.fp16_opt_level == "O3" or dtype == torch.bfloat16:
        return PrecisionPlan(args.fp16_opt_level, dtype, 1.0)
    return PrecisionPlan(args.fp16_opt_level, dtype, None if args.loss_scale == "dynamic" else float(args.loss_scale))


def _autocast(plan: PrecisionPlan, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=plan.dtype) if plan.level == "O1" else nullcontext()


class InferencePrecision:
    """A module's parameters at one O-level, without masters and gradients.

    Args:
        plan: what to do.
        module: on its device, in fp32; converted in place.
    """

    def __init__(self, plan: PrecisionPlan, module: nn.Module):
        self.plan = plan
        module.requires_grad_(False)
        if plan.level in ("O2", "O3"):
            module.to(plan.dtype)
        self.device = next(module.parameters()).device

    def autocast(self) -> AbstractContextManager:
        """Context of the forward pass: autocast at O1, nothing otherwise."""
        return _autocast(self.plan, self.device)


class Precision:
    """A module's parameters at one O-level, its gradients, and the loss scale.

    Args:
        plan: what to do.
        module: on its device, in fp32; converted in place.
    """

    def __init__(self, plan: PrecisionPlan, module: nn.Module):
        self.plan = plan
        # Masters start from the weights as stored, not from what is left of them after the cast.
        exact = {name: p.detach() for name, p in module.named_parameters()} if plan.level == "O2" else {}
        if plan.level in ("O2", "O3"):
            module.to(plan.dtype)
        self.groups: list[FlatGroup] = flatten(module)
        device = self.groups[0].data.device
        self.is_dynamic = plan.loss_scale is None
        self.scale = _FIRST_SCALE if self.is_dynamic else plan.loss_scale
        self.clean_steps = self.overflows_in_a_row = self.skipped_steps = 0
        self.has_diverged = torch.zeros((), device=device)
        self.masters = [g.data for g in self.groups]
        if plan.level == "O2":
            self.masters = [torch.cat([exact[n].flatten() for n in g.names]) for g in self.groups]
        self.gradients = (
            [torch.zeros_like(m) for m in self.masters] if plan.level == "O2" else [g.grad for g in self.groups]
        )

    def autocast(self) -> AbstractContextManager:
        """Context of the forward pass: autocast at O1, nothing otherwise."""
        return _autocast(self.plan, self.groups[0].data.device)

    def zero_gradients(self) -> None:
        """Clear the flat buffers; the views stay, which NPU fused optimizers rely on."""
        for group in self.groups:
            group.grad.zero_()

    def gather_gradients(self) -> torch.Tensor:
        """Bring gradients to where the optimizer looks; returns their scaled L2 norm, 0-d fp32."""
        if self.plan.level == "O2":
            for gradient, group in zip(self.gradients, self.groups, strict=True):
                gradient.copy_(group.grad)
        return torch.stack([gradient.float().norm() for gradient in self.gradients]).norm()

    def step(self, optimizer: torch.optim.Optimizer, scaled_norm: torch.Tensor, max_norm: float) -> bool:
        """Unscale, clip, update, and copy masters to the model, unless a gradient is not finite.

        Clip, scale and the check for overflow go into a fused optimizer as device numbers, so that no
        pass over the gradients and no wait for the host is spent on them.

        Args:
            scaled_norm: of `gather_gradients`.
            max_norm: L2 norm gradients are clipped to, 0 for none.

        Returns:
            True if the update counts; False if it was skipped for overflow (dynamic scale only).

        Raises:
            DivergedError: overflow persists at the smallest scale.
        """
        scale = self.scale
        is_bad = (~torch.isfinite(scaled_norm)).float()
        if self.is_dynamic:
            if self._overflowed(bool(is_bad.item())):
                return False
        else:
            self.has_diverged.copy_(torch.maximum(self.has_diverged, is_bad))
        norm = scaled_norm / scale
        divisor = scale * ((norm / max_norm).clamp_(min=1.0) if max_norm else torch.ones_like(norm))
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = divisor, self.has_diverged
        elif self.has_diverged.item():
            return True
        else:
            for gradient in self.gradients:
                gradient.div_(divisor.to(gradient.dtype))
        optimizer.step()
        if self.plan.level == "O2":
            with torch.no_grad():
                for group, master in zip(self.groups, self.masters, strict=True):
                    group.data.copy_(master)
        return True

    def _overflowed(self, is_bad: bool) -> bool:
        """Dynamic scale after one backward: halve on overflow, double after enough clean steps."""
        if not is_bad:
            self.overflows_in_a_row = 0
            self.clean_steps += 1
            if self.clean_steps == _GROWTH_STEPS:
                self.scale, self.clean_steps = min(self.scale * 2.0, _LARGEST_SCALE), 0
            return False
        self.skipped_steps += 1
        self.overflows_in_a_row += 1
        self.clean_steps = 0
        if self.scale <= _SMALLEST_SCALE or self.overflows_in_a_row >= _MOST_OVERFLOWS:
            raise DivergedError(
                f"gradients overflow at loss scale {self.scale:g}, {self.overflows_in_a_row} times in a row: "
                "lower --learning_rate, or train with --bf16 or in fp32"
            )
        self.scale = max(self.scale / 2.0, _SMALLEST_SCALE)
        return True

    def check_finite(self) -> None:
        """Stop the run if a gradient under a static scale, or a weight, is not finite; waits for the device.

        Raises:
            DivergedError: it happened; after a bad gradient no update was made.
        """
        if self.has_diverged.item():
            raise DivergedError(
                "gradients are not finite (NaN or Inf); the update was not made and nothing was saved since: "
                "lower --learning_rate, check the data, or use --loss_scale dynamic with --fp16"
            )
        if not all(torch.isfinite(master).all() for master in self.masters):
            raise DivergedError("weights are not finite (NaN or Inf); nothing was saved since: lower --learning_rate")

    def scale_state(self) -> dict:
        """Numbers of the loss scale, for a checkpoint."""
        return {
            "scale": self.scale,
            "clean_steps": self.clean_steps,
            "skipped_steps": self.skipped_steps,
            "overflows_in_a_row": self.overflows_in_a_row,
        }

    def load_scale_state(self, state: dict) -> None:
        """Take back `scale_state`."""
        for name, value in state.items():
            setattr(self, name, value)
