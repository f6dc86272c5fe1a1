"""A model at one O-level (table in precision/plan.py): casts, fp32 masters, gradients and the loss scale.

Gradients are views of flat buffers at every level (`--use_combine_grad`). At O2 and O3 the passes of one optimizer
step are added up in fp32. The ranks add their gradients in the model's dtype, as torch's DDP does, which halves the
bytes; with several passes a step they add the fp32 sums. Each rank holds its share of the mean over all samples.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from bert_glue.devices.npu import overflow_flag
from bert_glue.errors import DivergedError
from bert_glue.precision.flat_buffers import FlatGroup, GradientBuffers, Rates, flatten, l2_norm
from bert_glue.precision.plan import BAD_GRADIENTS, MOST_OVERFLOWS, PrecisionPlan, check_weights, too_many_overflows

# apex's constants (apex/amp/scaler.py). A scale that is too large costs one skipped step for each halving.
_FIRST_SCALE, _GROWTH_STEPS, _LARGEST_SCALE = 2.0**16, 2000, 2.0**24
_SMALLEST_SCALE = 1.0  # ours: apex has no lower bound and halves for ever


def cast_module(module: nn.Module, dtype: torch.dtype, keeps_batch_norm: bool) -> None:
    """Cast parameters and buffers to `dtype`, in place; BatchNorm stays in fp32 if `keeps_batch_norm`."""
    for part in module.modules():
        if keeps_batch_norm and isinstance(part, nn.modules.batchnorm._BatchNorm):
            continue
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _autocast(plan: PrecisionPlan, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=plan.dtype) if plan.level == "O1" else nullcontext()


class InferencePrecision:
    """A module's parameters at one O-level, without masters and gradients.

    Args:
        plan: precision of the run.
        module: the model, on its device and in fp32; converted in place.
    """

    def __init__(self, plan: PrecisionPlan, module: nn.Module):
        self.plan = plan
        module.requires_grad_(False)
        if plan.level in ("O2", "O3"):
            cast_module(module, plan.dtype, keeps_batch_norm=plan.level == "O2")
        self.device = next(module.parameters()).device

    def autocast(self) -> AbstractContextManager:
        """The context of the forward pass: autocast at O1, nothing otherwise."""
        return _autocast(self.plan, self.device)


class NativePrecision:
    """A module's parameters at one O-level, its gradients, and the loss scale.

    At O3 the masters serve the update alone, which is computed in fp32 and then rounded. 16-bit Adam moments would
    underflow, and a weight would become infinite in the first step.

    Args:
        plan: precision of the run.
        module: the model, on its device and in fp32; converted in place.
        passes: backward passes of an optimizer step, >= 1.
        is_joint: False where the optimizer moves its gradients' allocations (see `GradientBuffers`).
        rates: factor of the learning rate by parameter name; None means 1 for all.

    Attributes:
        summed: buffers that the ranks add up in a step.
    """

    def __init__(
        self, plan: PrecisionPlan, module: nn.Module, passes: int = 1, is_joint: bool = True, rates: Rates = None
    ):
        self.plan = plan
        has_masters = plan.level in ("O2", "O3")
        # Masters start from the stored weights: the rounded ones lack 13 bits in fp16 and 16 in bf16. Masters take 4
        # bytes a parameter on top of the model's 2.
        exact = {name: p.detach() for name, p in module.named_parameters()} if has_masters else {}
        if has_masters:
            cast_module(module, plan.dtype, keeps_batch_norm=plan.level == "O2")
        self.groups: list[FlatGroup]
        self.groups, self._of_model = flatten(module, is_joint or has_masters, rates)
        device = self.groups[0].data.device
        self.is_dynamic = plan.loss_scale is None
        self.scale = _FIRST_SCALE if self.is_dynamic else plan.loss_scale
        self.clean_steps = self.overflows_in_a_row = self.skipped_steps = 0
        # The kernels of a step read the scale and write the overflow flags in device memory. A CUDA graph can then
        # record and replay them, and the host waits for none of them.
        self._scale = torch.tensor(float(self.scale), device=device)
        self.norm, self._is_bad, self.has_diverged = (torch.zeros((), device=device) for _ in range(3))
        self.masters = [group.data for group in self.groups]
        self._of_masters = self.summed = self._of_model
        self._adds_passes = has_masters and passes > 1
        if has_masters:
            self.masters = [torch.cat([exact[n].flatten() for n in g.names]) for g in self.groups]
            self._of_masters = GradientBuffers(self.masters, is_joint)
        if self._adds_passes:
            self.summed = self._of_masters
        self.gradients = self._of_masters.gradients
        # On chips that saturate, gradients stay finite in an overflow; this register alone shows the overflow.
        self._register = overflow_flag(device)
        self._copy_masters()

    def optimizer_groups(self, per_parameter: bool) -> list[tuple[list[nn.Parameter], bool]]:
        """The parameters that an optimizer updates, with gradients: (parameters, whether they are decayed) a group.

        Args:
            per_parameter: True gives one view a parameter, for optimizers that look at whole parameters; False gives
                one flat parameter a group.
        """
        found = []
        for group, master, gradient in zip(self.groups, self.masters, self.gradients, strict=True):
            pieces = [(master, gradient)]
            if per_parameter:
                pieces = list(zip(group.views(master).values(), group.views(gradient).values(), strict=True))
            parameters = [nn.Parameter(value) for value, _ in pieces]
            for parameter, (_, grad) in zip(parameters, pieces, strict=True):
                parameter.grad = grad
            found.append((parameters, group.is_decayed))
        return found

    def gradient_memory(self) -> list[torch.Tensor]:
        """Everything that `backward` and `gather_gradients` change, slots and flags included."""
        buffers = [self._of_model] if self._of_masters is self._of_model else [self._of_model, self._of_masters]
        flags = [self.norm, self._is_bad]
        return [*(allocation for one in buffers for allocation in one.allocations), *flags]

    def weight_memory(self) -> list[torch.Tensor]:
        """Everything that `update` changes, apart from the optimizer's state."""
        # The gradients too: torch's fused AdamW writes them back after it has divided them by the scale.
        models = [g.data for g, master in zip(self.groups, self.masters, strict=True) if g.data is not master]
        return [*self.masters, *models, *self.gradients, self.has_diverged]

    def attach(self, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
        """Return the optimizer unchanged: native levels need not know it."""
        return optimizer

    def describe(self) -> str:
        """A line for the log on how gradients are stored."""
        sizes = " + ".join(f"{g.grad.numel():,} x {g.grad.element_size()} bytes" for g in self.groups)
        dtypes = self.summed.dtypes
        names = " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
        collectives = f"{len(dtypes)} all-reduce(s) a step in {names}"
        return f"views of {len(self.groups)} flat buffers ({sizes}), {collectives}, fused clip"

    def autocast(self) -> AbstractContextManager:
        """The context of the forward pass: autocast at O1, nothing otherwise."""
        return _autocast(self.plan, self.groups[0].data.device)

    def zero_gradients(self) -> None:
        """Clear every buffer that a step adds to, and write the scale of this step to the device."""
        self._of_model.zero()
        if self._adds_passes:  # with one pass `gather_gradients` overwrites them, which saves 4 bytes a parameter
            self._of_masters.zero()
        if self.is_dynamic:
            self._scale.fill_(self.scale)
        if self._register is not None:
            self._register.clear()

    def backward(self, loss: torch.Tensor | None, is_last: bool = True) -> None:
        """Compute the scaled gradients of one forward pass.

        Args:
            loss: 0-d. None if this rank has no sample in the pass.
            is_last: True in the optimizer step's last pass.
        """
        if loss is not None:
            (loss * self._scale).backward()
            # A loss that is not finite must stop the update on all ranks, although its gradients may be finite. Then
            # 0 * loss is NaN and reaches every rank inside a gradient, without a collective or a wait of its own.
            self.groups[0].grad[0] += 0.0 * loss.detach()
            if self._adds_passes:
                self._add_pass()
        if is_last and self._register is not None:
            self.summed.overflow.copy_(self._register.read())

    def _add_pass(self) -> None:
        """Add a pass's 16-bit gradients to the fp32 sums."""
        # In bf16 a sum of 512 ones would end at 256, where 1 is below the last bit. The fp32 sums cost 8 bytes of
        # traffic a parameter and pass.
        for gradient, group in zip(self.gradients, self.groups, strict=True):
            gradient.add_(group.grad)
            group.grad.zero_()

    def gather_gradients(self) -> torch.Tensor:
        """Copy gradients to where the optimizer reads them; return `norm`, their unscaled L2 norm, 0-d fp32."""
        # At O2 and O3 the ranks add 16-bit gradients, half the bytes, and the optimizer reads fp32. The copy is one
        # launch a group and 6 bytes of traffic a parameter.
        if not self._adds_passes:
            for gradient, group in zip(self.gradients, self.groups, strict=True):
                if gradient is not group.grad:
                    gradient.copy_(group.grad)
        # The norm of the scaled gradients is divided by the scale: unscaling every gradient first would cost another
        # pass over memory. A NaN or Inf anywhere makes the norm NaN or Inf, so that no pass has to look for them.
        self.norm.copy_(l2_norm(self.gradients) / self._scale)
        if self._register is not None:  # the sum over ranks can overflow although no single rank does
            self.summed.overflow.add_(self._register.read())
        self._is_bad.copy_(~torch.isfinite(self.norm) | (self.summed.overflow > 0))
        return self.norm

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float) -> bool:
        """Call `update`, unless `should_skip`.

        Args:
            norm: result of `gather_gradients`; set to NaN where the step is skipped.
            max_norm: L2 norm that gradients are clipped to; 0 for no clipping.

        Returns:
            True if the update counts; False if an overflow skips it (dynamic scale only).

        Raises:
            DivergedError: the overflow persists at the smallest scale.
        """
        if self.should_skip(norm):
            return False
        self.update(optimizer, norm, max_norm)
        return True

    def should_skip(self, norm: torch.Tensor) -> bool:
        """Whether a dynamic scale skips this step's update because of an overflow; adjusts the scale.

        Raises:
            DivergedError: the overflow persists at the smallest scale.
        """
        if not self.is_dynamic:
            return False
        # The host waits here for all passes of the step, because it must know the answer before it launches the update.
        # A static scale waits for nothing.
        if not self._overflowed(bool(self._is_bad.item())):
            return False
        norm.fill_(torch.nan)  # chips that saturate leave a finite norm, which would look valid in the log
        return True

    def update(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float) -> None:
        """Unscale, clip, update, and copy masters to the model, unless a gradient is not finite.

        A fused optimizer takes the clip, the scale and the overflow flag as device numbers. They then cost no pass over
        the gradients and no wait of the host.

        Args:
            norm: result of `gather_gradients`.
            max_norm: L2 norm that gradients are clipped to; 0 for no clipping.
        """
        if not self.is_dynamic:
            self.has_diverged.copy_(torch.maximum(self.has_diverged, self._is_bad))
        # Unscaling and clipping are one division by one number on the device.
        divisor = self._scale * ((norm / max_norm).clamp_(min=1.0) if max_norm else torch.ones_like(norm))
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = divisor, self.has_diverged
        elif self.has_diverged.item():  # the host waits here once a step: only fused optimizers take `found_inf`
            return
        else:
            for gradient in self.gradients:
                gradient.div_(divisor)
        optimizer.step()
        self._copy_masters()

    @torch.no_grad()
    def _copy_masters(self) -> None:
        """Round masters into the model; at O3 the masters are then rounded too."""
        # One launch a group and 6 bytes a parameter. At O0 and O1 the masters are the model's own memory, and nothing
        # is copied.
        for group, master in zip(self.groups, self.masters, strict=True):
            if master is not group.data:
                group.data.copy_(master)
                if self.plan.level == "O3":
                    master.copy_(group.data)

    def _overflowed(self, is_bad: bool) -> bool:
        """Adjust the dynamic scale after a step: halve it on overflow, double it after enough clean steps."""
        if not is_bad:
            self.overflows_in_a_row = 0
            self.clean_steps += 1
            if self.clean_steps == _GROWTH_STEPS:
                self.scale = min(self.scale * 2.0, _LARGEST_SCALE)
                self.clean_steps = 0
            return False
        self.skipped_steps += 1
        self.overflows_in_a_row += 1
        self.clean_steps = 0
        if self.overflows_in_a_row >= MOST_OVERFLOWS:
            raise DivergedError(too_many_overflows(self.overflows_in_a_row, self.scale))
        self.scale = max(self.scale / 2.0, _SMALLEST_SCALE)
        return True

    def check_finite(self) -> None:
        """Stop the run if a gradient under a static scale, or a weight, is not finite; waits for the device.

        Raises:
            DivergedError: one of them is not finite. No update follows a gradient that is not finite.
        """
        if self.has_diverged.item():
            raise DivergedError(BAD_GRADIENTS)
        check_weights(self.masters)

    def named_masters(self) -> dict[str, torch.Tensor]:
        """The fp32 masters by parameter name; empty where the model itself holds every digit."""
        if self.plan.level != "O2":
            return {}
        named: dict[str, torch.Tensor] = {}
        for group, master in zip(self.groups, self.masters, strict=True):
            named |= group.views(master)
        return named

    @torch.no_grad()
    def load_masters(self, values: list[torch.Tensor]) -> None:
        """Restore a copy of `masters`, in the model too."""
        for master, value in zip(self.masters, values, strict=True):
            master.copy_(value)
        self._copy_masters()

    def scale_state(self) -> dict:
        """The numbers of the loss scale, for a checkpoint."""
        return {
            "scale": self.scale,
            "clean_steps": self.clean_steps,
            "skipped_steps": self.skipped_steps,
            "overflows_in_a_row": self.overflows_in_a_row,
        }

    def load_scale_state(self, state: dict) -> None:
        """Restore what `scale_state` returned."""
        for name, value in state.items():
            setattr(self, name, value)
