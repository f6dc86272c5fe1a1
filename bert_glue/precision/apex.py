"""`--amp_backend apex`: the levels as apex's `amp` implements them, called as the reference calls it.

The reference calls `amp.initialize(model, optimizer, opt_level, loss_scale, combine_grad)`, and then
`with amp.scale_loss(loss, optimizer)` around each backward. Ascend's apex has `combine_grad` and fused optimizers;
NVIDIA's had amp until 2025-05. The interface is that of `NativePrecision`. Two things are added to apex: gradients that
are not finite under a static scale end the run, and checkpoints hold masters and scale.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from bert_glue.devices.distributed import DistributedContext
from bert_glue.errors import DivergedError, MachineError
from bert_glue.precision.flat_buffers import GradientBuffers, NamedGroup, l2_norm, named_groups
from bert_glue.precision.plan import (
    BAD_GRADIENTS,
    MOST_OVERFLOWS,
    USE_NATIVE,
    PrecisionPlan,
    check_weights,
    load_amp,
    takes_combine_grad,
    too_many_overflows,
)


class ApexPrecision:
    """A module under apex's amp; a `TrainingPrecision`.

    Args:
        plan: precision of the run, with the backend apex.
        module: the model, on its device and in fp32; `attach` converts it in place.
        ranks: ranks over which gradients are summed before amp inspects them.
        combine_grad: whether to use Ascend's flat gradients and their fused clip.

    Raises:
        MachineError: apex is absent or cannot do this.
    """

    def __init__(self, plan: PrecisionPlan, module: nn.Module, ranks: DistributedContext, combine_grad: bool):
        self.plan = plan
        self.module = module
        self.ranks = ranks
        self.combine_grad = combine_grad
        self.amp = load_amp(combine_grad)
        self.groups: list[NamedGroup] = named_groups(module)
        self.optimizer: torch.optim.Optimizer | None = None
        # Only the slots: `backward` sums the gradients over the ranks itself.
        self.summed = GradientBuffers([], device=next(module.parameters()).device)
        self.skipped_steps = self.overflows_in_a_row = 0
        self._overflowed = False

    def optimizer_groups(self, per_parameter: bool) -> list[tuple[list[nn.Parameter], bool]]:
        """(parameters, whether they are decayed) a group; amp takes the module's own parameters."""
        return [(group.parameters, group.is_decayed) for group in self.groups]

    def attach(self, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
        """Pass module and optimizer to amp; `optimizer` is None for evaluation alone.

        Raises:
            MachineError: amp does not accept this optimizer at this level.
        """
        scale = "dynamic" if self.plan.loss_scale is None else self.plan.loss_scale
        options = {"opt_level": self.plan.level, "loss_scale": scale}
        if takes_combine_grad(self.amp):
            options["combine_grad"] = self.combine_grad
        try:
            if optimizer is None:
                self.amp.initialize(self.module, **options)
                return None
            _, self.optimizer = self.amp.initialize(self.module, optimizer, **options)
        except RuntimeError as error:
            raise MachineError(f"--amp_backend apex: {error}; {USE_NATIVE}") from error
        self.optimizer.zero_grad()  # amp creates the masters here; a checkpoint can only be loaded after that
        return self.optimizer

    def describe(self) -> str:
        """A line for the log on how gradients are stored."""
        return "combined by apex, fused clip" if self.combine_grad else "one tensor a parameter, by apex"

    def autocast(self) -> AbstractContextManager:
        """An empty context: at O1 amp patches torch's functions instead."""
        return nullcontext()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups for p in group.parameters]

    @property
    def masters(self) -> list[torch.Tensor]:
        """The tensors that the optimizer updates, in the order of `groups`."""
        if self.optimizer is None:
            return self._parameters()
        return list(self.amp.master_params(self.optimizer))

    @property
    def scale(self) -> float:
        """The current loss scale."""
        return next(iter(self.amp.state_dict().values()))["loss_scale"]

    def zero_gradients(self) -> None:
        """Clear the gradients by the optimizer's own method."""
        self.optimizer.zero_grad()  # combined gradients must keep their addresses, which only this method knows
        self._overflowed = False

    def backward(self, loss: torch.Tensor | None, is_last: bool = True) -> None:
        """Compute the gradients of one forward pass; after the last pass, sum them over the ranks and unscale them.

        Args:
            loss: 0-d. None if this rank has no sample in the pass.
            is_last: True in the optimizer step's last pass.
        """
        alone = self.ranks.world_size == 1
        if loss is None:
            if alone or not is_last:
                return
            # The other ranks wait in the all_reduce for this rank's gradients, which are zero.
            loss = 0.0 * sum(p.float().sum() for p in self._parameters())
        before = self.scale
        # Several ranks unscale once, after their sum. A single rank unscales into fp32 after each pass, as the
        # reference does; this costs a pass over the gradients each time.
        options = {} if alone or is_last else {"delay_unscale": True}
        with self.amp.scale_loss(loss, self.optimizer, **options) as scaled:
            scaled.backward()
            # A loss that is not finite must stop the update on all ranks, although its gradients may be finite.
            next(p.grad for p in self._parameters() if p.grad is not None).view(-1)[0] += 0.0 * loss.detach()
            if is_last and not alone:
                self._sum_over_ranks()
        self._overflowed |= self.scale < before  # amp does not report a skipped step, but lowers its scale

    def _sum_over_ranks(self) -> None:
        gradients: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in self._parameters():
            if parameter.grad is not None:
                gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        # apex decides where gradients lie. They are copied into one buffer a dtype and back, so that the ranks pay the
        # latency of one collective and not of one for each parameter.
        for same in gradients.values():
            flat = torch.cat([gradient.flatten() for gradient in same])
            self.ranks.all_reduce([flat])
            for gradient, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def gather_gradients(self) -> torch.Tensor:
        """The L2 norm of the unscaled gradients, 0-d fp32."""
        return l2_norm([p.grad.float() for p in self.masters if p.grad is not None])

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float) -> bool:
        """Clip and update, unless amp skips the step for an overflow; as `NativePrecision.step`.

        Raises:
            DivergedError: gradients are not finite under a static scale, or the overflow persists.
        """
        if self._overflowed:
            optimizer.step()  # amp has replaced it by a step that does nothing but restore the real one
            self.skipped_steps += 1
            self.overflows_in_a_row += 1
            if self.overflows_in_a_row >= MOST_OVERFLOWS:
                raise DivergedError(too_many_overflows(self.overflows_in_a_row, self.scale))
            return False
        self.overflows_in_a_row = 0
        if not torch.isfinite(norm):  # the host waits here for the step's passes
            raise DivergedError(BAD_GRADIENTS)
        if max_norm and self.combine_grad:
            optimizer.clip_optimizer_grad_norm_fused(max_norm)
        elif max_norm:
            # As torch's clip_grad_norm_, but with the logged norm: torch's own is too low for large parameters.
            factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)
            for master in self.masters:
                if master.grad is not None:
                    master.grad.mul_(factor)
        optimizer.step()
        return True

    def check_finite(self) -> None:
        """Raise DivergedError if a weight is not finite."""
        check_weights(self.masters)

    def named_masters(self) -> dict[str, torch.Tensor]:
        """The fp32 masters by parameter name; empty at every level but O2."""
        if self.plan.level != "O2":
            return {}
        names = [name for group in self.groups for name in group.names]
        return {name: master.detach() for name, master in zip(names, self.masters, strict=True)}

    @torch.no_grad()
    def load_masters(self, values: list[torch.Tensor]) -> None:
        """Restore a copy of `masters`, in the model too."""
        for parameter, master, value in zip(self._parameters(), self.masters, values, strict=True):
            master.copy_(value)
            parameter.copy_(value)

    def scale_state(self) -> dict:
        """The state of amp and our counts, for a checkpoint."""
        return {
            "amp": self.amp.state_dict(),
            "skipped_steps": self.skipped_steps,
            "overflows_in_a_row": self.overflows_in_a_row,
        }

    def load_scale_state(self, state: dict) -> None:
        """Restore what `scale_state` returned."""
        self.amp.load_state_dict(state["amp"])
        self.skipped_steps, self.overflows_in_a_row = state["skipped_steps"], state["overflows_in_a_row"]
