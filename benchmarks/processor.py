"""One results file for the processor at hand: ours against the stock Trainer, in fp32 and bf16, and memory over time.

    python benchmarks/processor.py --model MINILM --vocab vocab.txt --data_path GLUE --out benchmarks/results

About 45 minutes on two free cores with AVX-512 and AMX, more than an hour with AVX2. MINILM is a folder of MiniLM (6
layers, hidden size 384), measured on five tasks; the bert-base shape has random weights and is measured on mrpc. bf16
is left out, and the file says so, where the processor has no products of that format: the stock Trainer then takes
minutes for a step. A stage that has been measured is kept, so that an interrupted call goes on with the next one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import throughput  # noqa: E402
from benchmarks.common import resident_by_step  # noqa: E402

_MEMORY_STEPS, _WINDOW = 300, 50


@dataclass(frozen=True)
class Stage:
    """One report of `throughput.measure_model`.

    Args:
        shape: published shape with random weights; "" for the model of --model.
        rows: training rows of each task.
        flags: of run_glue.py, beyond those of `throughput.command`.
    """

    shape: str
    tasks: str
    rows: int
    flags: tuple[str, ...] = ()

    @property
    def is_bf16(self) -> bool:
        """Whether both sides train in bf16: ours at O2, the stock Trainer by autocast."""
        return "--bf16" in self.flags


_BF16 = ("--bf16", "--fp16_opt_level", "O2")
STAGES = {
    "MiniLM, fp32": Stage("", "cola,sst2-like,stsb,mrpc,qnli", 640),
    "MiniLM, bf16": Stage("", "cola,sst2-like,stsb,mrpc,qnli", 640, _BF16),
    "bert-base shape, fp32": Stage("bert-base", "mrpc", 160),
    "bert-base shape, bf16": Stage("bert-base", "mrpc", 160, _BF16),
}


def file_name() -> str:
    """Of this processor's results, such as cpu-amd-avx2.json: vendor, widest vectors, matrix unit."""
    import torch

    from bert_glue.devices import cpu

    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(cpu.vendor(), "arm")
    matrix = "-amx" if "amx_bf16" in cpu.features() else ""
    return f"cpu-{vendor}-{torch.backends.cpu.get_cpu_capability().lower()}{matrix}.json"


def measure_memory(args: argparse.Namespace, flags: tuple[str, ...]) -> dict[str, int]:
    """Highest resident bytes of ours in each 50 of 300 steps of mrpc, by the window's first step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        asked = [
            sys.executable, str(ROOT / "run_glue.py"), "--model_name_or_path", args.model, "--task_name", "mrpc",
            "--data_path", args.data_path, "--do_train", "--max_seq_length", "128", "--per_device_train_batch_size",
            "32", "--max_steps", str(args.memory_steps), "--logging_steps", "10", "--save_strategy", "no",
            "--output_dir", str(out), *flags,
        ]  # fmt: skip
        found = resident_by_step(asked, args.threads, _WINDOW)
    return {str(first): max(sizes) for first, sizes in found.items()}


def _report(stage: Stage, args: argparse.Namespace) -> dict:
    given = ["--shape", stage.shape, "--vocab", str(args.vocab)] if stage.shape else ["--model", args.model]
    asked = throughput.parse(
        [
            *given, "--data_path", args.data_path, "--tasks", stage.tasks, "--rows", str(args.rows or stage.rows),
            "--rounds", str(args.rounds), "--threads", str(args.threads), "--json", os.devnull, "--", *stage.flags,
        ]
    )  # fmt: skip
    return throughput.measure_model(asked, lambda report: None)


def measure(args: argparse.Namespace, file: Path) -> None:
    """Run the stages that `file` does not have yet; each is written when it is done."""
    import torch

    from bert_glue.devices.device import has_slow_products

    empty = {"date": datetime.date.today().isoformat(), "reports": [], "left_out": {}, "resident_bytes": {}}
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else empty
    have = {report["stage"] for report in content["reports"]}
    for name, stage in STAGES.items():
        if name in have or (args.stages and name not in args.stages.split(";")):
            continue
        if stage.is_bf16 and has_slow_products("cpu", torch.bfloat16):
            content["left_out"][name] = "this processor has no bf16 products"
        else:
            content["reports"].append({"stage": name, **_report(stage, args)})
            if not stage.shape:
                content["resident_bytes"][name] = measure_memory(args, stage.flags)
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of MiniLM")
    parser.add_argument("--vocab", type=Path, required=True, help="vocabulary of the bert-base shape")
    parser.add_argument("--data_path", required=True, help="as for run_glue.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="training rows a task instead of the stages' own")
    parser.add_argument("--memory_steps", type=int, default=_MEMORY_STEPS)
    parser.add_argument("--stages", help=f"some of them, with ; between: {'; '.join(STAGES)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / file_name()
    measure(args, file)
    content = json.loads(file.read_text(encoding="utf-8"))
    for report in content["reports"]:
        print(f"{report['stage']}\n{throughput.table(report)}\n")
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
