"""Recorded, compiled and resumed training runs of this device against plain ones, and what a step costs the host."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import StageRows
from benchmarks.gpu_stages.attention import DTYPES
from benchmarks.gpu_stages.random_runs import Setting, train
from bert_glue.devices.device import Device, resolve_device
from bert_glue.training import cuda_graphs
from bert_glue.training.console import ConsoleLog
from bert_glue.training.state import TrainState

# Steps in which two runs that differ by rounding alone stay close; later each step multiplies the difference.
_FIRST_STEPS = 10
# Largest difference of their losses.
_APART = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}


def compared(one: TrainState, other: TrainState) -> dict[str, object]:
    """How far two runs lie apart: losses step by step, and the final weights."""
    from bert_glue.training.resume import whole_weights

    losses = [[entry["loss"] for entry in run.progress.history if "loss" in entry] for run in (one, other)]
    weights = [whole_weights(run) for run in (one, other)]
    far = [abs(a - b) for a, b in zip(*losses, strict=True)]
    return {
        "steps": len(far),
        "losses_equal": losses[0] == losses[1],
        "first_steps_apart": max(far[:_FIRST_STEPS]),
        "largest_loss_difference": max(far),
        "first_difference_at": next((step for step, difference in enumerate(far, 1) if difference), None),
        "weights_equal": all(torch.equal(x, weights[1][name]) for name, x in weights[0].items()),
        "last_losses": [losses[0][-1], losses[1][-1]],
    }


def _replays(run: TrainState) -> tuple[int, int]:
    """Replayed passes, and all passes."""
    works = [work for _, work in getattr(run.step, "passes", {}).values()]
    return sum(work.replays for work in works), sum(work.runs for work in works)


# Case -> what differs from bf16 O2 with dropout 0.1, and flags.
_CASES: dict[str, tuple[dict, dict]] = {
    "O2 bf16, no dropout": ({"dropout": 0.0}, {}),
    "O2 bf16": ({}, {}),
    "O1 bf16": ({"level": "O1"}, {}),
    "O2 fp16": ({"precision": "fp16"}, {}),
    "O2 fp16, dynamic scale": ({"precision": "fp16"}, {"loss_scale": "dynamic"}),
    "O2 bf16, two passes a step": ({"batch": 4}, {"gradient_accumulation_steps": 2}),
    "O3 bf16, average": ({"level": "O3"}, {"ema_decay": 0.9}),
    "O2 bf16, R-Drop": ({}, {"rdrop_alpha": 0.5}),
    "O2 bf16, adamw_torch": ({}, {"optim": "adamw_torch"}),
    "O0 fp32": ({"level": "O0", "precision": "fp32"}, {}),
}


def _cases(rows: StageRows, device: Device, name: str):
    """(case, setting, flags) of the runs of one stage that this device and its time allow; the others say why not."""
    shape, steps = ("tiny", 10) if rows.is_tiny else ("small", 120)
    base = Setting(shape=shape, batch=8, lengths=(5, 20), steps=steps, skip=steps // 2)
    for case, (changes, flags) in list(_CASES.items())[: 1 if rows.is_tiny else None]:
        setting = replace(base, **changes)
        if not device.supports(DTYPES[setting.precision]):
            rows.skip(name, f"no {setting.precision} here", case=case)
        elif rows.has_time(10, name, case=case):
            yield case, setting, {"logging_steps": 1, "learning_rate": 1e-3, **flags}


def check_recorded(rows: StageRows) -> None:
    """Recorded steps against the same steps before they are recorded, bit for bit; and against a plain run."""
    device, name = resolve_device("auto"), "recorded against eager"
    if not device.can_record:
        return rows.skip(name, f"{device.name} cannot record steps")
    for case, setting, flags in _cases(rows, device, name):
        with rows.row(name, case=case) as found:
            setting = replace(setting, is_recorded=True)
            with patch.object(cuda_graphs, "_EAGER_FIRST", 10**9):
                eager = train(setting, **flags)
            recorded = train(setting, **flags)
            found["replayed_passes"], found["passes"] = _replays(recorded)
            found |= compared(eager, recorded)
            found["ok"] = found["losses_equal"] and found["weights_equal"] and found["replayed_passes"] > 0
            if setting.dropout == 0.0:  # else the plain run, whose batches have other filler, draws other masks
                plain = train(replace(setting, is_recorded=False), **flags)
                found["from_plain_run"] = compared(plain, recorded)["first_steps_apart"]
                found["ok"] &= found["from_plain_run"] < _APART[setting.precision]
    return None


def check_compiled(rows: StageRows) -> None:
    """Compiled steps against eager ones, which have the same dropout masks; a compiler rounds otherwise."""
    device, name = resolve_device("auto"), "compiled against eager"
    for case, setting, flags in _cases(rows, device, name):
        if not rows.has_time(20, name, case=case):
            continue
        with rows.row(name, case=case) as found:
            found |= compared(train(setting, **flags), train(replace(setting, is_compiled=True), **flags))
            found["ok"] = found["first_steps_apart"] < _APART[setting.precision]


def check_resumed(rows: StageRows) -> None:
    """A run of run_glue.py that resumes after step 20 of 40 ends with the bytes of the undisturbed one."""
    device = resolve_device("auto")
    eager, recorded = "--cuda_graph=false", "--cuda_graph=true"
    o1, o2 = (["--bf16", f"--fp16_opt_level={level}"] for level in ("O1", "O2"))
    ways = {"O0 fp32": [eager], "O2 bf16": [*o2, eager]}
    if device.can_record:
        ways |= {"O2 bf16, recorded": [*o2, recorded], "O1 bf16, recorded": [*o1, recorded]}
    for case, flags in list(ways.items())[: 1 if rows.is_tiny else None]:
        if rows.has_time(10, "resumed bit for bit", case=case):
            with rows.row("resumed bit for bit", case=case) as found, tempfile.TemporaryDirectory() as folder:
                whole, again = Path(folder) / "whole", Path(folder) / "again"
                _run_glue(whole, *flags)
                _run_glue(again, *flags, f"--resume_from_checkpoint={whole / 'checkpoint-20'}")
                files = ("model.safetensors", "checkpoint-30/optimizer.safetensors")
                found |= {file: (whole / file).read_bytes() == (again / file).read_bytes() for file in files}
                found["ok"] = all(found.values())


def _run_glue(out: Path, *flags: str) -> None:
    """The product's own pipeline on its generated sample, in this process.

    Raises:
        RuntimeError: it ended with another code than 0.
    """
    import run_glue

    code = run_glue.main(
        [
            "--task_name=mrpc", "--sample", "--do_train", "--max_train_samples=64", "--max_steps=40",
            "--save_strategy=steps", "--save_steps=10", "--hidden_dropout_prob=0.2",
            "--attention_probs_dropout_prob=0.1", "--report_to=none", "--disable_tqdm", f"--output_dir={out}", *flags,
        ]
    )  # fmt: skip
    if code:
        raise RuntimeError(f"run_glue.py ended with code {code}")


# ---- what a step asks of the host ----


class _Operators(TorchDispatchMode):
    """Counts what torch dispatches, in the backward pass too."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


class StepWindow(ConsoleLog):
    """Opens a context for some steps of a run.

    Args:
        first, last: optimizer steps, both inside.
        context: entered before the first one, left after the last one.
    """

    def __init__(self, first: int, last: int, context):
        super().__init__(True, False)
        self.first, self.last, self._context = first, last, context

    def advance(self, step: int, total: int, epoch: float) -> None:
        """Called at the end of each step."""
        if step == self.first - 1:
            self._context.__enter__()
        if step == self.last:
            self._context.__exit__(None, None, None)


@contextmanager
def _waits(device: Device, places: dict[str, int]):
    """Counts the places where the host waits for the device: torch's own debug mode warns there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not device.is_host:
            torch.cuda.set_sync_debug_mode("warn")
            caught.clear()  # it warns once that it is new
        try:
            yield
        finally:
            if not device.is_host:
                torch.cuda.set_sync_debug_mode("default")
            for one in caught:
                place = f"{Path(one.filename).name}:{one.lineno}"
                places[place] = places.get(place, 0) + 1


def check_waits(rows: StageRows) -> None:
    """Operators that a step dispatches, and the places where the host waits for the device: none."""
    device = resolve_device("auto")
    shape, steps = ("tiny", 8) if rows.is_tiny else ("small", 70)
    name, base = "waits and operators a step", Setting(shape=shape, batch=8, steps=steps, skip=2)
    for level, precision, is_recorded in (
        ("O2", "bf16", False), ("O1", "bf16", False), ("O0", "fp32", False), ("O2", "bf16", True)
    ):  # fmt: skip
        setting = replace(base, level=level, precision=precision, is_recorded=is_recorded)
        if is_recorded and not device.can_record:
            rows.skip(name, f"{device.name} cannot record steps", **setting.about)
            continue
        with rows.row(name, **setting.about) as found:
            places: dict[str, int] = {}
            operators = _Operators()
            train(setting, StepWindow(steps - 6, steps - 4, _waits(device, places)))
            train(setting, StepWindow(steps - 6, steps - 4, operators))
            found |= {"waits_in_3_steps": places, "operators_a_step": operators.count / 3, "ok": not places}
