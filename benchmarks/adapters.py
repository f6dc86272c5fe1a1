"""Compares training steps with LoRA and with a frozen encoder to steps that train all weights, on the same batch.

    python benchmarks/adapters.py --shape bert-base --lengths 20:90 --json out.json

Random weights and tokens: no data is needed. A round runs one step of each; its CPU seconds (of one thread)
and its time by the clock are ratios inside the round, and their medians are printed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import write_model  # noqa: E402

MODES = {
    "all": {},
    "lora_8": {"lora_rank": 8},
    "lora_8_all_linear": {"lora_rank": 8, "lora_target_modules": "all-linear"},
    "frozen": {"freeze_encoder": True},
}


class Step:
    """One optimizer step of one mode, as training does it."""

    def __init__(self, folder: Path, changes: dict, lengths: list[int]):
        import torch

        from bert_glue.config.arguments import Arguments
        from bert_glue.data.packing import PackedLayout
        from bert_glue.model.loading import load_model
        from bert_glue.precision.native import NativePrecision
        from bert_glue.precision.plan import PrecisionPlan
        from bert_glue.tasks import get_task
        from bert_glue.training.optim import build_optimizer

        args = Arguments(model_name_or_path=str(folder), do_train=True, **changes)
        self.model = load_model(args, get_task("mrpc"))
        self.precision = NativePrecision(PrecisionPlan("O0", torch.float32, 1.0), self.model.module)
        self.optimizer, _ = build_optimizer(args, self.precision.optimizer_groups(False))
        layout = PackedLayout(tuple(lengths))
        positions = torch.from_numpy(layout.positions)[None]
        words = torch.randint(5, 8000, positions.shape, generator=torch.Generator().manual_seed(0))
        self.inputs = {"input_ids": words, "token_type_ids": positions * 0, "position_ids": positions, "layout": layout}
        self.labels = torch.arange(len(lengths)) % 2

    def seconds(self) -> tuple[float, float]:
        """(CPU, clock) of one step."""
        import torch

        from bert_glue.model.layers import DropoutMasks

        cpu, clock = time.process_time(), time.perf_counter()
        self.model.module.train()
        self.precision.zero_gradients()
        loss = torch.nn.functional.cross_entropy(
            self.model.module(**self.inputs, dropout_masks=DropoutMasks(0)), self.labels
        )
        self.precision.backward(loss)
        self.precision.step(self.optimizer, self.precision.gather_gradients(), 1.0)
        return time.process_time() - cpu, time.perf_counter() - clock


def measure(shape: str, lengths: list[int], rounds: int) -> dict:
    """Ratios of each mode to `all`, medians over rounds after one that is not counted."""
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), shape)
        steps = {mode: Step(Path(name), changes, lengths) for mode, changes in MODES.items()}
    seen = [{mode: step.seconds() for mode, step in steps.items()} for _ in range(rounds + 1)][1:]
    ratio = {
        mode: [statistics.median(one["all"][at] / one[mode][at] for one in seen) for at in (0, 1)] for mode in MODES
    }
    return {
        mode: {
            "speedup_cpu_seconds": ratio[mode][0],
            "speedup_clock": ratio[mode][1],
            "optimizer_elements": sum(m.numel() for m in step.precision.masters),
        }
        for mode, step in steps.items()
    }


def main() -> None:
    """Measure, print and, with --json, keep."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="bert-base", help="a shape of hf_recipe.py")
    parser.add_argument("--lengths", default="20:90", help="tokens of a sequence, least:most")
    parser.add_argument("--rows", type=int, default=16, help="sequences of the batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    low, high = map(int, args.lengths.split(":"))
    draw = random.Random(0)
    lengths = [draw.randint(low, high) for _ in range(args.rows)]
    settings = {
        "shape": args.shape,
        "lengths": lengths,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "threads": 1,
    }
    found = {"settings": settings, "modes": measure(args.shape, lengths, args.rounds)}
    for mode, figures in found["modes"].items():
        print(mode, {name: round(value, 2) for name, value in figures.items()})
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
