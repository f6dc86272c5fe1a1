"""Compares the scores of bert_glue and the stock Hugging Face Trainer with equal model, rows, steps and settings.

    python benchmarks/quality.py --model FOLDER --data_path GLUE --seeds 3 --rows rows.jsonl
    python benchmarks/quality.py --rows rows.jsonl --table

Each (task, run, seed) is a separate process, and its scores are one line of `--rows`. If the first command is
interrupted, the same command continues with the missing runs. `ours` is packed fp32 (O0), `ours_bf16_O2` is bf16 O2,
and `hf` is the stock Trainer of hf_recipe.py with dynamic padding. Other runs are `ours` with one technique. `hf` and
`ours` draw batches from different generators, so equal seeds do not mean equal batches. The interval of the
difference is Student's t over the pairs of seeds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import by_seed, cell, difference, finish, measure_missing, read_rows, scores  # noqa: E402

# task -> optimizer steps of one run at batch 32, and the dev rows scored (None: all). About 20 to 40
# processor minutes a seed for all six and both runs with MiniLM.
PLAN: dict[str, tuple[int, int | None]] = {
    "wnli": (40, None),
    "mrpc": (115, None),
    "cola": (134, None),
    "stsb": (90, None),
    "qnli": (60, 1000),
    "mnli": (60, 1000),
}
RUNS = {"ours": (), "ours_bf16_O2": ("--bf16", "--fp16_opt_level", "O2"), "hf": ()}
# Each is compared with `ours`: same seed, same initial weights, same batches.
TECHNIQUES = {
    "layerwise_0.9": ("--layerwise_lr_decay", "0.9"),
    "reinit_1": ("--reinit_layers", "1"),
    "ema_0.98": ("--ema_decay", "0.98"),
    "rdrop_1": ("--rdrop_alpha", "1"),
    "fgm_0.5": ("--fgm_epsilon", "0.5"),
    "intermediate": (),  # from --intermediate, a finished run of another task, in place of --model
}


def command(args: argparse.Namespace, task: str, run: str, seed: int, out: Path) -> list[str]:
    """The process of one run; its results go to `out`."""
    steps, rows = PLAN[task]
    shared = ["--data_path", args.data_path, "--max_seq_length", "128", "--learning_rate", str(args.learning_rate)]
    shared += ["--seed", str(seed), "--warmup_steps", str(args.warmup_steps)]
    shared += ["--max_eval_samples", str(rows)] if rows else []
    if run == "hf":
        return [
            sys.executable, str(ROOT / "benchmarks" / "hf_recipe.py"), "--model", args.model, "--task", task, *shared,
            "--padding", "longest", "--batch_size", "32", "--train_steps", str(steps), "--eval", "--use_cpu",
            "--json", str(out / "hf.json"),
        ]  # fmt: skip
    return [
        sys.executable, str(ROOT / "run_glue.py"), "--model_name_or_path",
        args.intermediate if run == "intermediate" else args.model, "--task_name", task, *shared,
        "--do_train", "--do_eval", "--max_steps", str(steps), "--per_device_train_batch_size", "32",
        "--per_device_eval_batch_size", "32", "--save_strategy", "no", "--use_cpu", "--output_dir", str(out),
        *{**RUNS, **TECHNIQUES}[run],
    ]  # fmt: skip


def measure(args: argparse.Namespace, task: str, run: str, seed: int) -> dict:
    """One line of the rows file."""
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep / f"{task}-{run}-{seed}" if args.keep else Path(name)
        finish(command(args, task, run, seed, folder), args.threads)
        found = scores(task, run, folder)
    steps, rows = PLAN[task]
    how = {"learning_rate": args.learning_rate, "warmup_steps": args.warmup_steps, "steps": steps, "eval_rows": rows}
    return {"task": task, "run": run, "seed": seed, **how, "seconds": round(time.time() - began, 1), "scores": found}


def table(rows: list[dict]) -> str:
    """Markdown: per task and metric the mean and deviation (x100) of each run, and the differences over seeds."""
    lines = [
        "| task | steps | metric | seeds | ours | stock Trainer | difference, 95 % | ours bf16 O2 "
        "| bf16 O2 - fp32, 95 % |",
        "|" + "---|" * 9,
    ]
    for task, (steps, _) in PLAN.items():
        of_task = [row for row in rows if row["task"] == task]
        for metric in of_task[0]["scores"] if of_task else ():
            found = {run: by_seed(of_task, task, run, metric) for run in RUNS}
            cells = {run: cell(list(values.values())) for run, values in found.items()}
            lines.append(
                f"| {task} | {steps} | {metric} | {len(found['ours'])} | {cells['ours']} | {cells['hf']} "
                f"| {difference(found['ours'], found['hf'])} | {cells['ours_bf16_O2']} "
                f"| {difference(found['ours_bf16_O2'], found['ours'])} |"
            )
    return "\n".join(lines)


def pairs(rows: list[dict]) -> tuple[int, int, int]:
    """Pairs of `ours` and `hf`, and in how many of them ours is higher, and lower, in the task's headline metric."""
    from bert_glue.tasks import TASKS

    found = []
    for task in PLAN:
        ours, theirs = (by_seed(rows, task, run, TASKS[task].headline) for run in ("ours", "hf"))
        found += [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return len(found), sum(gap > 0 for gap in found), sum(gap < 0 for gap in found)


def technique_table(rows: list[dict]) -> str:
    """Markdown: per task, metric and technique the scores (x100) with and without it, over common seeds."""
    lines = ["| task | metric | technique | seeds | plain | with it | difference, points |", "|" + "---|" * 7]
    for task, run in itertools.product(PLAN, TECHNIQUES):
        for metric in next((row["scores"] for row in rows if (row["task"], row["run"]) == (task, run)), ()):
            plain, tried = (by_seed(rows, task, name, metric) for name in ("ours", run))
            seeds = sorted(plain.keys() & tried.keys())
            if seeds:
                cells = " | ".join(cell([found[seed] for seed in seeds]) for found in (plain, tried))
                lines.append(f"| {task} | {metric} | {run} | {len(seeds)} | {cells} | {difference(tried, plain)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder of a BERT-family model")
    parser.add_argument("--data_path", help="as for run_glue.py")
    parser.add_argument("--intermediate", metavar="RUN", help="what the run of that name starts from")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs there, such as for combine.py")
    parser.add_argument("--tasks", default=",".join(PLAN))
    parser.add_argument("--runs", default="ours,hf", help=f"some of {', '.join([*RUNS, *TECHNIQUES])}")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--warmup_steps", type=float, default=0.0, help="below 1: share of all steps")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rows", type=Path, required=True, help="file of results, one line per run")
    parser.add_argument("--table", action="store_true", help="print the table of --rows and end")
    args = parser.parse_args()
    if args.table:
        rows = read_rows(args.rows)
        print(technique_table(rows) if any(row["run"] in TECHNIQUES for row in rows) else table(rows))
        return 0
    if not (args.model and args.data_path):
        parser.error("give --model and --data_path, or --table")
    if "intermediate" in args.runs.split(",") and not args.intermediate:
        parser.error("--runs intermediate needs --intermediate")
    tasks, runs = args.tasks.split(","), args.runs.split(",")
    measure_missing(args.rows, args.seeds, tasks, runs, lambda *which: measure(args, *which))
    return 0


if __name__ == "__main__":
    sys.exit(main())
