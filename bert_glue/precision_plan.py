"""Which O-level a run trains at: asked for, checked against the device and apex.

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

from dataclasses import dataclass

import torch

from bert_glue.arguments import Arguments
from bert_glue.device import Device
from bert_glue.errors import MachineError

_REFERENCE_SCALE = 1024.0


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


def plan_precision(args: Arguments, device: Device) -> PrecisionPlan:
    """The precision asked for, checked against the device.

    Raises:
        MachineError: the device cannot train so and `--fallback_precision` is none; or apex is asked
            for and cannot do it.
    """
    level, fp32 = args.fp16_opt_level, torch.float32
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
    if args.amp_backend == "apex":
        from bert_glue.apex_amp import load_amp

        load_amp(args.use_combine_grad)
    backend = "apex" if args.amp_backend == "apex" else "native"
    if level == "O0":
        return PrecisionPlan("O0", fp32, 1.0, backend=backend)
    return PrecisionPlan(level, dtype, 1.0 if args.bf16 else _scale(args), backend=backend)


def _scale(args: Arguments) -> float | None:
    """The static scale, None for dynamic; a level's own where the flag was not given."""
    if args.loss_scale is None:
        return 1.0 if args.fp16_opt_level == "O3" else _REFERENCE_SCALE
    return None if args.loss_scale == "dynamic" else float(args.loss_scale)
