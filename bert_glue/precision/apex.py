"""`--amp_backend apex`: the levels as apex's `amp` does them, called the way the reference calls it.

`amp.initialize(model, optimizer, opt_level, loss_scale, combine_grad)`, then `with amp.scale_loss(loss,
optimizer)` around each backward. Ascend's apex has `combine_grad` and fused optimizers, NVIDIA's had amp
until 2025-05. The same interface as `NativePrecision`; what is ours on top: gradients that are not finite under
a static scale end the run, masters and scale go into checkpoints.
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
        plan: its backend is apex.
        module: on its device, in fp32; converted in place by `attach`.
        ranks: gradients are added over them before amp looks at them.
        combine_grad: Ascend's flat gradients and their fused clip.
    """

    def __init__(self, plan: PrecisionPlan, module: nn.Module, ranks: DistributedContext, combine_grad: bool):
        self.plan = plan
        self.module = module
        self.ranks = ranks
        self.combine_grad = combine_grad
        self.amp = load_amp(combine_grad)
        self.groups: list[NamedGroup] = named_groups(module)
        self.optimizer: torch.optim.Optimizer | None = None
        # Slots only: `backward` adds the gradients over the ranks itself.
        self.summed = GradientBuffers([], device=next(module.parameters()).device)
        self.skipped_steps = self.overflows_in_a_row = 0
        self._overflowed = False

    def optimizer_groups(self, per_parameter: bool) -> list[tuple[list[nn.Parameter], bool]]:
        """(parameters, whether they are decayed) a group; amp wants the module's own."""
        return [(group.parameters, group.is_decayed) for group in self.groups]

    def attach(self, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
        """Hand module and optimizer to amp; None for evaluation alone.

        Raises:
            MachineError: amp does not take this optimizer at this level.
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
        self.optimizer.zero_grad()  # makes the masters, so that a checkpoint can be loaded into them
        return self.optimizer

    def describe(self) -> str:
        """How gradients are kept, one line for the log."""
        return "combined by apex, fused clip" if self.combine_grad else "one tensor a parameter, by apex"

    def autocast(self) -> AbstractContextManager:
        """Nothing: at O1 amp has patched torch's functions."""
        return nullcontext()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.groups for p in group.parameters]

    @property
    def masters(self) -> list[torch.Tensor]:
        """What the optimizer updates, in the order of `groups`."""
        if self.optimizer is None:
            return self._parameters()
        return list(self.amp.master_params(self.optimizer))

    @property
    def scale(self) -> float:
        """Loss scale now."""
        return next(iter(self.amp.state_dict().values()))["loss_scale"]

    def zero_gradients(self) -> None:
        """The optimizer's own way: combined gradients must stay where they are."""
        self.optimizer.zero_grad()
        self._overflowed = False

    def backward(self, loss: torch.Tensor | None, is_last: bool = True) -> None:
        """Gradients of one forward pass; after a step's last one they are added over ranks and unscaled.

        Args:
            loss: 0-d; None where this rank has no sample in the pass.
            is_last: True in the optimizer step's last pass.
        """
        alone = self.ranks.world_size == 1
        if loss is None:
            if alone or not is_last:
                return
            # The other ranks wait for this one's share, which is zero.
            loss = 0.0 * sum(p.float().sum() for p in self._parameters())
        before = self.scale
        # Several ranks unscale once, after their sum; one rank after each pass, into fp32, as the reference.
        options = {} if alone or is_last else {"delay_unscale": True}
        with self.amp.scale_loss(loss, self.optimizer, **options) as scaled:
            scaled.backward()
            # A loss that is not finite stops the update on all ranks; the gradients may be finite still.
            next(p.grad for p in self._parameters() if p.grad is not None).view(-1)[0] += 0.0 * loss.detach()
            if is_last and not alone:
                self._sum_over_ranks()
        self._overflowed |= self.scale < before  # amp tells nobody that it skips a step; its scale shows it

    def _sum_over_ranks(self) -> None:
        gradients: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in self._parameters():
            if parameter.grad is not None:
                gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        # apex keeps gradients where it likes: they are copied into one buffer a dtype and back, so that ranks pay the
        # latency of one collective and not of one a parameter.
        for same in gradients.values():
            flat = torch.cat([gradient.flatten() for gradient in same])
            self.ranks.all_reduce([flat])
            for gradient, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def gather_gradients(self) -> torch.Tensor:
        """L2 norm of the unscaled gradients, 0-d fp32."""
        return l2_norm([p.grad.float() for p in self.masters if p.grad is not None])

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, max_norm: float) -> bool:
        """Clip and update, unless amp skips for overflow; as `NativePrecision.step`.

        Raises:
            DivergedError: gradients are not finite under a static scale, or overflow persists.
        """
        if self._overflowed:
            optimizer.step()  # amp has put a step there that does nothing
            self.skipped_steps += 1
            self.overflows_in_a_row += 1
            if self.overflows_in_a_row >= MOST_OVERFLOWS:
                raise DivergedError(too_many_overflows(self.overflows_in_a_row, self.scale))
            return False
        self.overflows_in_a_row = 0
        if not torch.isfinite(norm):
            raise DivergedError(BAD_GRADIENTS)
        if max_norm and self.combine_grad:
            optimizer.clip_optimizer_grad_norm_fused(max_norm)
        elif max_norm:
            # As torch's clip_grad_norm_, but by the norm that is logged: torch's own is low for large parameters.
            factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0)
            for master in self.masters:
                if master.grad is not None:
                    master.grad.mul_(factor)
        optimizer.step()
        return True

    def check_finite(self) -> None:
        """Raises DivergedError if a weight is not finite."""
        check_weights(self.masters)

    def named_masters(self) -> dict[str, torch.Tensor]:
        """fp32 masters under their parameters' names; empty but at O2."""
        if self.plan.level != "O2":
            return {}
        names = [name for group in self.groups for name in group.names]
        return {name: master.detach() for name, master in zip(names, self.masters, strict=True)}

    @torch.no_grad()
    def load_masters(self, values: list[torch.Tensor]) -> None:
        """Take back a copy of `masters`, into the model too."""
        for parameter, master, value in zip(self._parameters(), self.masters, values, strict=True):
            master.copy_(value)
            parameter.copy_(value)

    def scale_state(self) -> dict:
        """amp's own state and our counts, for a checkpoint."""
        return {
            "amp": self.amp.state_dict(),
            "skipped_steps": self.skipped_steps,
            "overflows_in_a_row": self.overflows_in_a_row,
        }

    def load_scale_state(self, state: dict) -> None:
        """Take back `scale_state`."""
        self.amp.load_state_dict(state["amp"])
        self.skipped_steps, self.overflows_in_a_row = state["skipped_steps"], state["overflows_in_a_row"]
