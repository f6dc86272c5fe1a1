"""Compares `--recipe stable` with `--recipe reference` on the first training rows of a task.

    python benchmarks/recipe_quality.py --model FOLDER --data_path GLUE --seeds 5 --rows rows.jsonl
    python benchmarks/recipe_quality.py --rows rows.jsonl --table

It uses few rows because twenty epochs of all rows take hours on a CPU, and because `stable` is meant for small data
(Zhang et al. 2021 also reduce larger tasks to 1,000 rows). All runs use the same learning rate instead of those in the
recipes. `stable` ends with its best epoch on the dev set, which raises its score; `reference_best_epoch` is
`reference` with the same choice. If the first command is interrupted, the same command continues it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import by_seed, cell, difference, finish, measure_missing, read_rows, scores  # noqa: E402

BEST_EPOCH = ("--eval_strategy", "epoch", "--save_strategy", "epoch", "--save_total_limit", "1")
RUNS = {
    "reference": ("--recipe", "reference", "--save_strategy", "no"),
    "reference_best_epoch": ("--recipe", "reference", *BEST_EPOCH, "--load_best_model_at_end"),
    "stable": ("--recipe", "stable"),
}


def measure(args: argparse.Namespace, task: str, run: str, seed: int) -> dict:
    """One line of the rows file."""
    began = time.time()
    how = {"learning_rate": args.learning_rate, "train_rows": args.train_rows}
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            sys.executable, str(ROOT / "run_glue.py"), "--model_name_or_path", args.model, "--task_name", task,
            "--data_path", args.data_path, *RUNS[run], "--learning_rate", str(args.learning_rate),
            "--max_train_samples", str(args.train_rows), "--seed", str(seed), "--fallback_precision", "fp32",
            "--do_train", "--do_eval", "--use_cpu", "--output_dir", folder,
        ]  # fmt: skip
        finish(asked, args.threads)
        found = scores(task, run, Path(folder))
    return {"task": task, "run": run, "seed": seed, **how, "seconds": round(time.time() - began, 1), "scores": found}


def table(rows: list[dict]) -> str:
    """Markdown: per task and metric the mean and deviation (x100) of each run and what `stable` adds to each."""
    lines = [
        "| task | metric | seeds | reference | reference, best epoch | stable | stable - reference, 95 % "
        "| stable - reference of the best epoch, 95 % |",
        "|" + "---|" * 8,
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        for metric in of_task[0]["scores"]:
            found = {run: by_seed(of_task, task, run, metric) for run in RUNS}
            cells = " | ".join(cell(list(found[run].values())) for run in RUNS)
            gains = [difference(found["stable"], found[run]) for run in RUNS if run != "stable"]
            lines.append(f"| {task} | {metric} | {len(found['stable'])} | {cells} | {' | '.join(gains)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder of a BERT-family model")
    parser.add_argument("--data_path", help="as for run_glue.py")
    parser.add_argument("--tasks", default="cola,mrpc")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--train_rows", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rows", type=Path, required=True, help="file of results, one line per run")
    parser.add_argument("--table", action="store_true", help="print the table of --rows and end")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(args.rows)))
        return 0
    if not (args.model and args.data_path):
        parser.error("give --model and --data_path, or --table")
    measure_missing(args.rows, args.seeds, args.tasks.split(","), RUNS, lambda *which: measure(args, *which))
    return 0


if __name__ == "__main__":
    sys.exit(main())
