"""What the NPU's fused AdamW does with gradients, and how our loop treats it; prints JSON. On the simulated NPU.

PYTHONPATH=tests/support/simulated_npu python tests/support/fused_semantics.py
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch_npu  # noqa: F401  (the simulated one)
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from bert_glue.devices.npu import npu_fused_adamw
from bert_glue.precision.flat_buffers import flatten

STEPS, OPTIONS = 6, {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}


def second_step_after(gradient_is_new: bool) -> float:
    """A weight from 0, with gradient 1 and then -1, by steps of 1 down or up the gradient's sign alone."""
    weight = nn.Parameter(torch.zeros(1, device="npu"))
    weight.grad = torch.ones(1, device="npu")
    optimizer = npu_fused_adamw([{"params": [weight], "weight_decay": 0.0}], lr=1.0, betas=(0.0, 0.0), eps=1e-12)
    optimizer.step()
    if gradient_is_new:
        weight.grad = None
        weight.grad = -torch.ones(1, device="npu")
    else:
        weight.grad.fill_(-1.0)
    optimizer.step()
    return weight.item()


def loss(module: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, generator=generator).to(next(module.parameters()).device)
    return (module(x) ** 2).mean()


def ours(module: nn.Module, drops_gradients: bool) -> dict[str, torch.Tensor]:
    """Weights after some steps on flat buffers; as the loop does it, or with gradients dropped in between."""
    groups, _ = flatten(module.to("npu"), is_joint=False)
    params = []
    for group in groups:
        leaf = nn.Parameter(group.data)
        leaf.grad = group.grad
        params.append({"params": [leaf], "weight_decay": 0.1 if group.is_decayed else 0.0})
    optimizer = npu_fused_adamw(params, **OPTIONS)
    for step in range(STEPS):
        if drops_gradients:
            module.zero_grad(set_to_none=True)
        for group in groups:
            group.grad.zero_()
        loss(module, step).backward()
        optimizer.step()
    return {name: p.detach().cpu() for name, p in module.named_parameters()}


def torchs(module: nn.Module) -> dict[str, torch.Tensor]:
    """The same with torch's own AdamW on the host."""
    decayed = [p for name, p in module.named_parameters() if name.endswith("weight")]
    others = [p for name, p in module.named_parameters() if name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(module, step).backward()
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in b)


if __name__ == "__main__":
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    expected = torchs(copy.deepcopy(net))
    optimizer = npu_fused_adamw(
        [{"params": [nn.Parameter(torch.zeros(1, device="npu"))], "weight_decay": 0.0}], **OPTIONS
    )
    report = {
        "class": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "source": sys.modules[type(optimizer).__module__].__file__,
        "overwritten": second_step_after(gradient_is_new=False),
        "replaced": second_step_after(gradient_is_new=True),
        "ours": farthest(ours(copy.deepcopy(net), False), expected),
        "dropping": farthest(ours(copy.deepcopy(net), True), expected),
    }
    print(json.dumps(report))
