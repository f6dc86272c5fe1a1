"""Ours against the stock Hugging Face Trainer, in turn, on the same rows, model, threads and precision.

    python benchmarks/throughput.py --model FOLDER --data_path GLUE --tasks cola,mrpc --rounds 2 --json out.json

Each round runs `ours`, `hf_default` (padded to 128, the default of Hugging Face's run_glue.py) and `hf_best`
(dynamic padding, similar lengths together) one after the other, each in its own process, on the first
`--rows` training rows. Machines are noisy: only ratios inside one round are formed, and their median is
printed. Rates are real tokens per second after the first steps; hf_default computes 128 tokens a row
whatever the row holds, so that `--default_steps` of it are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SKIP = 2
RUNS = ("ours", "hf_default", "hf_best")


def subset(folder: Path, task_name: str, data_path: str, rows: int) -> Path:
    """The first `rows` training rows of a task as a jsonl folder of its own."""
    from bert_glue.arguments import Arguments
    from bert_glue.sources import load_task_data

    data = load_task_data(Arguments(task_name=task_name, data_path=data_path), frozenset({"train"}))
    split = data.splits["train"].take(rows)
    labels = data.task.labels
    (folder / "train").mkdir(parents=True)
    with (folder / "train" / "rows.jsonl").open("w", encoding="utf-8") as file:
        for *texts, label in zip(*split.texts, split.labels, strict=True):
            row = dict(zip(data.task.columns, texts, strict=True))
            file.write(json.dumps(row | {"label": labels[label] if labels else label}) + "\n")
    return folder


def command(run: str, args: argparse.Namespace, task: str, data: Path, out: Path) -> list[str]:
    """The process of one measurement; its results go to `out`."""
    shared = ["--data_path", str(data), "--max_seq_length", "128", "--learning_rate", "5e-5"]
    if run == "ours":
        return [
            sys.executable, str(ROOT / "run_glue.py"), "--model_name_or_path", args.model, "--task_name", task,
            *shared, "--do_train", "--num_train_epochs", "1", "--per_device_train_batch_size", "32",
            "--output_dir", str(out), "--save_strategy", "no", "--skip_steps", str(SKIP),
        ]  # fmt: skip
    steps = ["--train_steps", str(args.default_steps)] if run == "hf_default" else ["--epochs", "1"]
    return [
        sys.executable, str(ROOT / "benchmarks" / "hf_recipe.py"), "--model", args.model, "--task", task, *shared,
        "--padding", "max_length" if run == "hf_default" else "grouped", *steps, "--batch_size", "32",
        "--skip_steps", str(SKIP), "--json", str(out / "hf.json"),
    ]  # fmt: skip


def measure(run: str, args: argparse.Namespace, task: str, data: Path) -> dict[str, float]:
    """One process: real tokens/s, seconds to its first step and to its end, peak bytes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        threads = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command(run, args, task, data, out), env={**os.environ, **threads}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{run} on {task} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        if run == "ours":
            r = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
            return {
                "real_tokens_per_second": r["train_real_tokens_per_second"],
                "seconds_to_first_step": r["seconds_to_first_step"],
                "peak_bytes": r["peak_memory_bytes"],
                "share_of_gemm": r["train_share_of_gemm"],
            }
        r = json.loads((out / "hf.json").read_text(encoding="utf-8"))
        return {
            "real_tokens_per_second": r["real_tokens_per_second"],
            "seconds_to_first_step": r["process_start_to_first_step_s"],
            "peak_bytes": r["training_peak_rss_bytes"],
        }


def compare(args: argparse.Namespace, task: str, data: Path) -> dict:
    """All rounds of a task: raw figures, and the median ratio of ours to each of the others."""
    rounds = []
    for number in range(args.rounds):
        found = {run: measure(run, args, task, data) for run in args.runs.split(",")}
        rounds.append(found)
        print(task, "round", number + 1, json.dumps(found), flush=True)
    result: dict = {"rounds": rounds}
    for other in RUNS[1:]:
        pairs = [(r["ours"], r[other]) for r in rounds if other in r]
        for name in ("real_tokens_per_second", "seconds_to_first_step", "peak_bytes"):
            if pairs:
                result[f"{name}_vs_{other}"] = statistics.median(ours[name] / theirs[name] for ours, theirs in pairs)
    result["share_of_gemm"] = statistics.median(r["ours"]["share_of_gemm"] for r in rounds)
    return result


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a BERT-family model")
    parser.add_argument("--data_path", required=True, help="as for run_glue.py")
    parser.add_argument("--tasks", default="cola,stsb,mrpc,qnli")
    parser.add_argument("--runs", default=",".join(RUNS), help="ours and any of the others")
    parser.add_argument("--rows", type=int, default=512, help="training rows")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--default_steps", type=int, default=6, help="steps of hf_default")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    report: dict = {"machine": f"{platform.machine()}, {args.threads} threads", "settings": vars(args), "tasks": {}}
    for task in args.tasks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            data = subset(Path(folder) / task, task, args.data_path, args.rows)
            report["tasks"][task] = compare(args, task, data)
        args.json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    for task, result in report["tasks"].items():
        print(task, {k: round(v, 3) for k, v in result.items() if k != "rounds"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
