"""A whole optimizer step on CUDA tensors without memory: `python fake_cuda_step.py LIBRARY LEVEL [PASSES [OPTIMIZER]]`.

FakeTensorMode computes shapes, dtypes and devices and no numbers. Every operator that torch would launch on a GPU is
counted here, autograd's and autocast's included. LIBRARY is the compiled fake_cuda.cpp, "" where torch itself has CUDA.
Prints what happened as JSON. A process of its own, because the library changes torch for good.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from types import SimpleNamespace

if sys.argv[1]:
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)

import numpy as np
import torch
from token_splits import _split
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bert_glue.config.arguments import Arguments
from bert_glue.data import batching
from bert_glue.data.batching import Collator
from bert_glue.devices.device import Device
from bert_glue.model import attention
from bert_glue.model.encoder import PackedClassifier
from bert_glue.model.family.bert import BERT
from bert_glue.precision.native import NativePrecision
from bert_glue.precision.plan import PrecisionPlan
from bert_glue.tasks import get_task
from bert_glue.training.loop import EagerStep
from bert_glue.training.setup import build_learner

BERT_BASE = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0,
}  # fmt: skip
LEVELS = {"O0": torch.float32, "O1": torch.bfloat16, "O2": torch.bfloat16}
# Operators whose result is a number or a shape that the host must know.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item", "bincount")


class Launches(TorchDispatchMode):
    """Counts the operators on the device, waits of the host, and copies between host and device."""

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: list[str] = []
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator._schema.name.removeprefix("aten::")
        if operator.namespace == "prim":  # asks for a device
            return operator(*args, **kwargs)
        if name.startswith(WAITS):
            self.waits.append(name)
        # torch has no shapes for the fused update, which returns nothing and changes its arguments in place.
        result = None if name.startswith("_fused_adamw_") else operator(*args, **kwargs)
        kinds = [leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if {"cpu", "cuda"} <= set(kinds) and name in ("_to_copy", "copy_", "to"):
            is_free = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            self.copies["asynchronous" if is_free else "blocking"] += 1
        elif "cuda" in kinds and not _is_view(operator, result, args):
            self.operators[name] += 1
        return result


def _is_view(operator, result, args) -> bool:
    """A view launches nothing: its result has an alias and no write."""
    returns = operator._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def main(level: str, passes: str = "1", optimizer: str = "adamw_torch_fused") -> dict:
    """The counts of collating, of one pass, and of all that follows the passes."""
    device, dtype, passes = Device("cuda", 0), LEVELS[level], int(passes)
    kernel = "torch's efficient kernel" if dtype == torch.float32 else "torch's flash kernel"
    attention.cuda_kernel = lambda *given, **sides: kernel  # the probe waits for a number, which these tensors lack
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # or autocast would switch itself off
    torch.cuda.is_bf16_supported = lambda *given: True
    batching._pinned_block = lambda size: torch.empty(size, dtype=torch.uint8)  # pinned memory needs a driver
    args = Arguments(
        do_train=True, bf16=dtype != torch.float32, fp16_opt_level=level, cuda_graph=True, max_grad_norm=1.0,
        gradient_accumulation_steps=passes, optim=optimizer,
    )  # fmt: skip
    lengths = np.random.default_rng(0).integers(25, 86, 32)
    split = _split([range(n) for n in lengths], labels=[n % 2 for n in lengths])
    phases = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda", 0):
        module = PackedClassifier(BERT.shape(BERT_BASE, 2)).train()
        precision = NativePrecision(PrecisionPlan(level, dtype, 1.0), module, passes)
        ranks = SimpleNamespace(rank=0, device=device)
        learner = build_learner(args, get_task("mrpc"), SimpleNamespace(module=module), precision, None, ranks)
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = EagerStep(learner, args.max_grad_norm)
        collate = Collator("packed", 128, 0, True, device.torch_device, is_rounded=True, is_coarse=True, is_pinned=True)
        for _ in range(2):  # the first step makes the optimizer's state
            with Launches() as phases["collate"]:
                batch = collate(split, np.arange(32))
            precision.zero_gradients()
            for number in range(passes):
                learner.objective.begin(number)
                with Launches() as phases["pass"]:
                    step.run_pass(batch, 32 * passes, is_last=number == passes - 1)
            with Launches() as phases["update"]:
                step.finish(step.gather_gradients())
    return {
        name: {
            "operators": found.operators.total(), "waits": found.waits, "copies": dict(found.copies),
            "most": dict(found.operators.most_common(60)),
        }
        for name, found in phases.items()
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[2:])))
