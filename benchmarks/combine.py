"""Scores combinations of several runs: a soup of their weights, and an ensemble of their predictions.

    python benchmarks/combine.py --data_path GLUE --rows rows.jsonl RUN RUN [RUN...]
    python benchmarks/combine.py --rows rows.jsonl --table

`benchmarks/quality.py --keep` keeps the runs. Each part uses the commands of a user: `bert-glue soup` with an
evaluation of its result, and `bert-glue predict` with all runs over the dev set.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import append, cell, finish, read_rows, scores  # noqa: E402
from bert_glue.result_keys import TRAIN_STEPS  # noqa: E402
from bert_glue.storage.files import read_results  # noqa: E402


def soup(task: str, runs: list[str], data_path: str, folder: Path) -> dict[str, float | None]:
    """The scores of the mean of the weights."""
    finish([sys.executable, "-m", "bert_glue", "soup", *runs, "--output_dir", str(folder / "soup")], 1)
    finish(
        [
            sys.executable, str(ROOT / "run_glue.py"), "--model_name_or_path", str(folder / "soup"), "--task_name",
            task, "--data_path", data_path, "--do_eval", "--use_cpu", "--output_dir", str(folder / "scored"),
        ],
        1,
    )  # fmt: skip
    return scores(task, "soup", folder / "scored")


def ensemble(task: str, runs: list[str], data_path: str, folder: Path) -> dict[str, float | None]:
    """The scores of the mean of the probabilities."""
    from bert_glue.config.arguments import Arguments
    from bert_glue.data.sources import load_task_data
    from bert_glue.evaluation.metrics import compute_metrics

    found: dict[str, float | None] = {}
    data = load_task_data(Arguments(task_name=task, data_path=data_path), frozenset({"evaluation"}))
    for split, suffix, _ in data.task.evaluation:
        rows = data.splits[split]
        source, labelled = folder / f"{split}.jsonl", folder / f"{split}-labelled.jsonl"
        texts = [dict(zip(data.task.columns, row, strict=True)) for row in zip(*rows.texts, strict=True)]
        source.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
        asked = ["predict", "--model", *runs, "--input", str(source), "--output", str(labelled), "--device", "cpu"]
        finish([sys.executable, "-m", "bert_glue", *asked], 1)
        answers = [json.loads(line)["prediction"] for line in labelled.read_text(encoding="utf-8").splitlines()]
        answers = answers if data.task.is_regression else [data.task.labels.index(answer) for answer in answers]
        measured = compute_metrics(data.task, answers, rows.labels)
        found |= {metric + suffix: measured[metric] for metric in data.task.metrics}
    return found


def measure(runs: list[str], data_path: str) -> dict:
    """One line of the rows file."""
    kept = [read_results(Path(run)) for run in runs]
    [task] = {results["task_name"] for results in kept}
    alone = [scores(task, "ours", Path(run)) for run in runs]
    with tempfile.TemporaryDirectory() as name:
        together = {make.__name__: make(task, runs, data_path, Path(name)) for make in (soup, ensemble)}
    steps = kept[0][TRAIN_STEPS]
    return {"task": task, "steps": steps, "runs": len(runs), "alone": alone, **together}


def table(rows: list[dict]) -> str:
    """Markdown: scores (x100) of the runs alone, the best of them, their soup and their ensemble."""
    lines = ["| task | steps | metric | runs | alone | best of them | soup | ensemble |", "|" + "---|" * 8]
    for row in rows:
        for metric in row["soup"]:
            alone = [scores[metric] or 0.0 for scores in row["alone"]]
            together = [cell([row[name][metric] or 0.0]) for name in ("soup", "ensemble")]
            lines.append(
                f"| {row['task']} | {row['steps']} | {metric} | {row['runs']} | {cell(alone)} | {cell([max(alone)])} "
                f"| {' | '.join(together)} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Measure and keep, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="output folders of runs of one task")
    parser.add_argument("--data_path", help="as for run_glue.py")
    parser.add_argument("--rows", type=Path, required=True, help="file of results, one line per call")
    parser.add_argument("--table", action="store_true", help="print the table of --rows and end")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(args.rows)))
        return 0
    if len(args.runs) < 2 or not args.data_path:
        parser.error("give two runs or more and --data_path, or --table")
    append(args.rows, measure(args.runs, args.data_path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
