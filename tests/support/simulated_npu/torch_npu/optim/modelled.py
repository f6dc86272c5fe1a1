"""A model of torch_npu's fused AdamW: it takes parameters and gradients over and steps on its own buffers.

What matters to callers and is modelled: at the first step every allocation with a gradient is moved into
one buffer a dtype, and later steps read those buffers, whatever `.grad` says by then.
"""

from __future__ import annotations

import torch

from torch_npu.operators import get_storage_size, npu_change_data_ptr


def _take_over(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Move tensors into one new buffer, in place."""
    sizes = [get_storage_size(x) for x in tensors]
    buffer = torch.zeros(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    begin = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        content = tensor.detach().clone()
        npu_change_data_ptr(tensor, buffer, begin)
        tensor.detach().copy_(content)
        begin += size
    return buffer


class NpuFusedAdamW(torch.optim.Optimizer):
    """Decoupled weight decay, bias correction; fp32 and fp16 parameters."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults)
        self.is_fused_optimizer = True
        self._buffers = None

    def _combine(self) -> None:
        self._buffers = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p.dtype not in (torch.float32, torch.float16):
                    raise TypeError(f"Fused optimizer's parameters must be either float32 or float16, not {p.dtype}")
                state = self.state[p]
                state.setdefault("step", 0)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = state[name].clone() if name in state else torch.zeros_like(p)
            kinds = ([p for p in params], [p.grad for p in params], *(
                [self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq")
            ))  # fmt: skip
            self._buffers.append([_take_over(tensors) for tensors in kinds])

    @torch.no_grad()
    def step(self, closure=None):
        if self._buffers is None:
            self._combine()
        for group, (param, grad, mean, square) in zip(self.param_groups, self._buffers, strict=True):
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] += 1
            done = self.state[group["params"][0]]["step"]
            beta1, beta2 = group["betas"]
            param.mul_(1 - group["lr"] * group["weight_decay"])
            mean.mul_(beta1).add_(grad, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = (square.sqrt() / (1 - beta2**done) ** 0.5).add_(group["eps"])
            param.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**done))

    @torch.no_grad()
    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        if self._buffers is None:
            self._combine()
        for _, grad, _, _ in self._buffers:
            grad.zero_()
