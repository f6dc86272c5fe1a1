"""Lists the devices of this machine and tests whether one of them trains. Runs as the doctor's child process.

    python -m bert_glue.doctor.device_probe npu:0

It prints one JSON object per line, each as soon as it is known. A broken driver may end the process or hang at any
point, and then the doctor still has the lines before. The test runs the real training loop on a tiny packed
classifier: forward, backward and update must be finite, and the weights must change.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bert_glue.errors import UserError, first_line

_PRECISIONS = {
    "fp32": {"fp16": False},
    "bf16": {"fp16": False, "bf16": True},
    "fp16": {},
}
_STEPS, _LENGTHS = 2, (9, 4, 12, 7, 3, 12, 5, 8)
_VOCABULARY = 64


class _Facts:
    """Writes facts to the original stdout. stdout itself is redirected to stderr, because drivers print to it."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def tell(self, fact: str, **values: Any) -> None:
        """One line."""
        print(json.dumps({"fact": fact, **values}), file=self.out, flush=True)

    def ask(self, fact: str, question: Callable[[], dict[str, Any]], **known: Any) -> bool:
        """Write the result of `question`, or the reason for its failure in one line. True if it did not fail."""
        try:
            self.tell(fact, **known, **question())
            return True
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # broken installations may raise anything, even SystemExit
            self.tell(fact, **known, **_failure(error))
            return False


def _failure(error: BaseException) -> dict[str, Any]:
    """`problem` in one line, its parts `what` and `fix` ("" if there is none), and its kind."""
    line, is_ours = first_line(error), isinstance(error, UserError)
    return {
        "problem": line,
        "what": error.what if is_ours and error.fix else line,
        "fix": error.fix if is_ours else "",
        "exit_code": error.exit_code if is_ours else None,
        "kind_of_error": type(error).__name__,
    }


def _torch() -> dict[str, Any]:
    import torch

    from bert_glue.training import setup  # noqa: F401  (everything that a run imports)

    return {"version": torch.__version__, "threads": torch.get_num_threads()}


def _devices_of(kind: str) -> dict[str, Any]:
    from bert_glue.devices.device import devices

    return {"devices": [_describe(device) for device in devices(kind)]}


def _describe(device: Any) -> dict[str, Any]:
    import torch

    from bert_glue.devices.device import has_slow_products

    about: dict[str, Any] = {"device": str(device.torch_device), "name": device.name, "fp32": True}
    about["product_library"] = device.product_library
    memory = None
    try:
        about["bf16"], about["fp16"] = device.supports(torch.bfloat16), device.supports(torch.float16)
        halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
        about["fp32_products"] = [name for name, dtype in halves.items() if has_slow_products(device.kind, dtype)]
        memory = device.memory()
    except Exception as error:  # the device is used by others, or the driver lacks this call
        about["problem"] = first_line(error)
    about["free_bytes"], about["total_bytes"] = memory or (None, None)
    return about


def _chosen(requested: str) -> dict[str, Any]:
    from bert_glue.devices.device import resolve_device

    device = resolve_device(requested)
    return {"device": str(device.torch_device), "name": device.name}


def _apex() -> dict[str, Any]:
    """Whether Ascend's or NVIDIA's apex is installed, and whether it still has amp."""
    import importlib.util

    if importlib.util.find_spec("apex") is None:
        return {"installed": False, "amp": False}
    import apex

    try:
        from apex import amp
    except ImportError as error:
        return {"installed": True, "amp": False, "file": apex.__file__, "reason": str(error)}
    return {"installed": True, "amp": hasattr(amp, "initialize"), "file": apex.__file__}


def _arguments(requested: str, precision: dict[str, Any]) -> Any:
    from bert_glue.config.parser import parse

    # The settings of test/train_full_1p.sh on real data.
    args = parse(
        [
            "--recipe=reference", "--task_name=sst2", "--sample", "--do_train", "--do_eval", "--skip_steps=5",
            "--fallback_precision=fp32", "--save_total_limit=1", "--output_dir=nowhere", f"--device={requested}",
        ]
    )  # fmt: skip
    return replace(
        args, **precision, max_steps=_STEPS, logging_steps=1, save_strategy="no", learning_rate=1e-3,
        dataloader_drop_last=False, disable_tqdm=True, seed=0,
    )  # fmt: skip


def _recipe(requested: str) -> dict[str, Any]:
    """The precision that the launchers' recipe selects on the device."""
    from bert_glue.devices.device import resolve_device
    from bert_glue.precision.plan import plan_precision

    plan = plan_precision(_arguments(requested, {}), resolve_device(requested))
    return {"precision": plan.name, "note": plan.note}


def _training(requested: str, precision: dict[str, Any]) -> dict[str, Any]:
    """Train a tiny packed classifier and return the figures.

    Raises:
        UserError: the precision is not supported, or the loss or gradients are not finite.
        RuntimeError: the weights did not change, or any error of the device.
    """
    import torch

    from bert_glue.model import attention

    attention.PATHS_TAKEN.clear()
    attention.REFUSALS.clear()
    began = time.perf_counter()
    state, device = _tiny_run(_arguments(requested, precision))
    before = [master.clone() for master in state.learner.precision.masters]
    from bert_glue.training.loop import train

    train(state)
    device.synchronize()
    moved = max(float((a - b).abs().max()) for a, b in zip(before, state.learner.precision.masters, strict=True))
    if not moved > 0.0:
        raise RuntimeError("the weights did not change in two optimizer steps")
    if not all(bool(torch.isfinite(master).all()) for master in state.learner.precision.masters):
        raise RuntimeError("the weights are not finite after two optimizer steps")
    return {
        "trains": True,
        "plan": state.learner.precision.plan.name,
        "optimizer": type(state.learner.optimizer).__name__,
        "steps": state.progress.step,
        "losses": [entry["loss"] for entry in state.progress.history],
        "seconds": time.perf_counter() - began,
        "attention": [
            *sorted(attention.PATHS_TAKEN),
            *(f"{name} does not run here: {reason}" for name, reason in attention.REFUSALS.items()),
        ],
        "gemm_gflops_per_second": _product_rate(device, state.learner.precision.plan.dtype),
    }


def _product_rate(device: Any, dtype: Any) -> float:
    """Matrix products of the dtype that a run would use, 10^9 operations per second."""
    from bert_glue.devices.device import product_dtype
    from bert_glue.training.throughput import gemm_rate

    return gemm_rate(device, product_dtype(device.kind, dtype)) / 1e9


def _tiny_run(args: Any) -> tuple[Any, Any]:
    """A `TrainState` with two layers and eight sequences, and its device."""
    import torch

    from bert_glue.data.batching import Collator, TrainingSampler
    from bert_glue.devices import cpu
    from bert_glue.devices.distributed import DistributedContext
    from bert_glue.evaluation.collapse import CollapseWatch
    from bert_glue.model.classifier import LoadedModel
    from bert_glue.model.encoder import PackedClassifier
    from bert_glue.model.weights import initialise
    from bert_glue.precision.plan import plan_precision
    from bert_glue.tasks import own_task
    from bert_glue.training.console import ConsoleLog, StopSignals, Trackers
    from bert_glue.training.setup import build_learner, build_step, make_precision
    from bert_glue.training.state import Observers, TrainData, TrainState, Validation
    from bert_glue.training.throughput import Meter

    ranks = DistributedContext(args)
    task = own_task("proof", ("text",), ("a", "b"))
    plan = plan_precision(replace(args, fallback_precision="none"), ranks.device)
    torch.manual_seed(args.seed)
    module = PackedClassifier(_tiny_shape())
    initialise(module, 0.02)
    module.to(ranks.device.torch_device)
    if ranks.device.is_host:
        cpu.use_threads(cpu.largest_product(module, sum(_LENGTHS)), None)
    precision = make_precision(args, plan, module, ranks)
    learner = build_learner(args, task, LoadedModel(module, None, {}, True), precision, None, ranks)
    data = TrainData(
        split=_tiny_split(),
        sampler=TrainingSampler(len(_LENGTHS), len(_LENGTHS), 1, 0, False),
        collate=Collator("packed", max(_LENGTHS), 0, True, ranks.device.torch_device),
        total_steps=_STEPS,
    )
    observers = Observers(
        log=ConsoleLog(False, False),
        trackers=Trackers(args, is_first=False),
        watch=CollapseWatch(0.0, _STEPS),
        meter=Meter(ranks.device, 0),
    )
    state = TrainState(
        args=args, task=task, ranks=ranks, data=data, learner=learner, step=build_step(args, learner, data, ranks),
        validation=Validation(evaluate=dict, best_key="eval_loss"), observers=observers, signals=StopSignals(False),
    )  # fmt: skip
    return state, ranks.device


def _tiny_shape() -> Any:
    from bert_glue.model.shape import EncoderShape

    # Head size 64, as in every BERT, because the kernel depends on it. Dropout 0, as in the published recipe.
    return EncoderShape(
        vocab=_VOCABULARY, embedding=128, hidden=128, layers=2, heads=2, intermediate=128, positions=16, types=2,
        labels=2, activation="gelu", norm_eps=1e-12, hidden_dropout=0.0, attention_dropout=0.0, output_dropout=0.0,
        head_activation="tanh", head_dropouts=(0.0, 0.0),
    )  # fmt: skip


def _tiny_split() -> Any:
    import numpy as np

    from bert_glue.data.batching import TokenSplit
    from bert_glue.data.tokenization import TokenTable

    offsets = np.cumsum([0, *_LENGTHS])
    ids = (np.arange(offsets[-1]) * 7 % _VOCABULARY).astype(np.int32)
    table = TokenTable(ids, offsets, np.zeros(len(ids), np.int8))
    return TokenSplit("train", table, np.arange(len(_LENGTHS)) % 2)


def _best_devices() -> dict[str, Any]:
    """Names of all devices of the best kind on this machine, and the free bytes of those that runs may share."""
    from bert_glue.devices.device import KINDS, devices

    found = next(filter(None, map(devices, KINDS)))
    free = {str(device.torch_device): device.memory()[0] for device in found if device.is_shared_by_itself}
    return {"devices": [str(device.torch_device) for device in found], "free_bytes": free}


def main(argv: list[str]) -> int:
    """Write all facts about the devices; `argv[0]` is the requested device. Returns 0 unless torch cannot be imported.

    With `--list`, write only one line about the devices of the best kind.
    """
    facts, requested = _Facts(), argv[0]
    if requested == "--list":
        return 0 if facts.ask("best", _best_devices) else 1
    if not facts.ask("torch", _torch):
        return 1
    from bert_glue.devices.device import KINDS

    for kind in KINDS:
        facts.ask("kind", lambda kind=kind: _devices_of(kind), kind=kind)
    facts.ask("auto", lambda: _chosen("auto"))
    facts.ask("apex", _apex)
    if facts.ask("chosen", lambda: _chosen(requested)):
        facts.ask("recipe", lambda: _recipe(requested))
        for name, precision in _PRECISIONS.items():
            facts.ask("training", lambda precision=precision: _training(requested, precision), precision=name)
    facts.tell("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
