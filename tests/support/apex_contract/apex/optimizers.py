"""apex.optimizers: FusedAdam (NVIDIA's and Ascend's) and NpuFusedAdamW (Ascend's)."""

from __future__ import annotations

import torch


class _Adam(torch.optim.Optimizer):
    """AdamW one line at a time; each subclass counts steps where the real one does."""

    def _update(self, group: dict, p: torch.Tensor, state: dict, t: int) -> None:
        beta1, beta2 = group["betas"]
        grad = p.grad.float()
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        mean, square = state["exp_avg"] / (1 - beta1**t), state["exp_avg_sq"] / (1 - beta2**t)
        update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p.float()
        p.copy_(p.float() - group["lr"] * update)


class FusedAdam(_Adam):
    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
        weight_decay=0.0, amsgrad=False, set_grad_none=True,
    ):  # fmt: skip
        if not adam_w_mode or amsgrad or not bias_correction:
            raise RuntimeError("this stand-in does AdamW with bias correction")
        super().__init__(
            params, {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.set_grad_none = set_grad_none

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1  # the step lives in the group, as in apex
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.float()), torch.zeros_like(p.float())
                self._update(group, p, state, group["step"])


class NpuFusedAdamW(_Adam):
    is_npu_fused_optimizer = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        if not hasattr(self, "amp"):
            raise RuntimeError("NpuFusedAdamW runs under amp only")
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                self._update(group, p, state, int(state["step"]))
