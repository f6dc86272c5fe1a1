"""What a run leaves behind: results as JSON, predictions, curves, a model card and a one-file report."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_glue.arguments import Arguments
from bert_glue.tasks import GlueTask

if TYPE_CHECKING:
    from bert_glue.batching import TokenSplit
    from bert_glue.model import LoadedModel
    from bert_glue.progress import ProgressLog
    from bert_glue.sources import TaskData


def show_example(data: TaskData, split: TokenSplit, model: LoadedModel, log: ProgressLog) -> None:
    """One training row as the model sees it: texts, tokens and label."""
    texts = [column[0] for column in data.splits[split.name].texts]
    ids = split.table.ids[split.table.borders[0] : split.table.borders[1]].tolist()
    tokens = " ".join(model.tokenizer.backend.id_to_token(i) or "?" for i in ids)
    label = split.labels[0] if data.task.is_regression else data.task.labels[split.labels[0]]
    log.line(f"example: {' | '.join(texts)}")
    log.line(f"  tokens: {tokens}")
    log.line(f"  label: {label}")


def write_json(path: Path, content: dict) -> None:
    """JSON that is never seen half-written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def write_predictions(folder: Path, task: GlueTask, suffix: str, predictions: np.ndarray) -> None:
    """`predict_results_<task>.txt`, header `index<TAB>prediction`, label names or scores to 3 decimals."""
    low, high = task.score_range or (-np.inf, np.inf)
    if task.is_regression:
        values = [f"{min(max(float(p), low), high):.3f}" for p in predictions]
    else:
        values = [task.labels[p] for p in predictions]
    lines = ["index\tprediction", *(f"{i}\t{value}" for i, value in enumerate(values))]
    (folder / f"predict_results_{task.name}{suffix}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_results(args: Arguments, data: TaskData, results: dict, history: list[dict], record: dict) -> None:
    """All files of a finished run, into `--output_dir`; `record` is run.json."""
    folder = Path(args.output_dir)
    write_json(folder / "all_results.json", results)
    for phase in ("train", "eval", "predict"):
        own = {k: v for k, v in results.items() if k.startswith(phase) or k in ("epoch", "task_name", "sample_data")}
        if getattr(args, f"do_{phase}"):
            write_json(folder / f"{phase}_results.json", own)
    write_json(folder / "run.json", record)
    if args.do_train:
        write_json(folder / "trainer_state.json", {"log_history": history, "global_step": results["train_steps"]})
        rows = [f"{e['step']}\t{e['loss']}\t{e['learning_rate']}" for e in history if "loss" in e]
        (folder / "train_loss.tsv").write_text("\n".join(["step\tloss\tlearning_rate", *rows]) + "\n")
        curves(folder / "curves.png", history, data)
        (folder / "README.md").write_text(model_card(data, results), encoding="utf-8")
    (folder / "report.html").write_text(report(data, results, folder), encoding="utf-8")


def table_rows(task: GlueTask, results: dict) -> list[tuple[str, str, str]]:
    """(where, score x100, samples/s) of this run and of the published ones, this run first."""
    keys = [f"eval_{task.headline}{suffix}" for _, suffix, _ in task.evaluation]
    own = [results[key] for key in keys if results.get(key) is not None]
    label = "this run" + (" (sample data, not GLUE)" if results["sample_data"] else "")
    rows = [(f"{label}, {results['device_name']}", _percent(own, 100.0), _rate(results))]
    for run in task.published:
        speed = f"{run.samples_per_second:g}" if run.samples_per_second else "-"
        rows.append((f"published: {run.where}, {run.epochs} epochs", _percent(run.scores, 1.0), speed))
    return rows


def _percent(values, factor: float) -> str:
    return " / ".join(f"{value * factor:.2f}" for value in values) or "-"


def _rate(results: dict) -> str:
    rate = results.get("train_samples_per_second")
    return "-" if rate is None else f"{rate:.1f}"


def summary(results: dict) -> list[str]:
    """Last lines of a run's log."""
    lines = ["***** results *****" + (" (sample data, not GLUE)" if results["sample_data"] else "")]
    shown = (
        "eval_",
        "train_loss",
        "train_samples_per_second",
        "train_padding",
        "train_share",
        "epoch",
        "e2e",
    )
    for name, value in results.items():
        if name.startswith(shown) or name in ("device_name", "precision", "fallback", "batches"):
            if isinstance(value, float):
                value = f"{value:.4f}"
            if value not in ("", None) or name == "train_samples_per_second":
                lines.append(f"  {name} = {value}")
    return lines


def curves(path: Path, history: list[dict], data: TaskData) -> None:
    """Loss, learning rate, metric and loss scale against steps, as a PNG."""
    from matplotlib.figure import Figure

    metric = f"eval_{data.task.headline}"
    panels = [key for key in ("loss", "learning_rate", metric, "loss_scale") if any(key in e for e in history)]
    figure = Figure(figsize=(8, 2.2 * max(1, len(panels))), layout="constrained")
    for number, key in enumerate(panels):
        points = [(e["step"], e[key]) for e in history if e.get(key) is not None]
        axes = figure.add_subplot(len(panels), 1, number + 1)
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="." if len(points) < 40 else "")
        axes.set_ylabel(key)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{data.task.name}, {data.source}", fontsize=9)
    figure.savefig(path, dpi=110)


def model_card(data: TaskData, results: dict) -> str:
    """README.md of the saved model."""
    rows = "\n".join(f"| {where} | {score} | {speed} |" for where, score, speed in table_rows(data.task, results))
    return (
        f"# {results['model_name_or_path']} fine-tuned on {data.task.name}\n\n"
        f"Data: {data.source}. Precision: {results['precision']}. Batches: {results['batches']}. "
        f"Device: {results['device_name']}, {results['world_size']} rank(s). Seed {results['seed']}.\n\n"
        f"| run | {data.task.headline} x100 | samples/s |\n|---|---|---|\n{rows}\n\n"
        "One seed is noise: compare means over several. Versions, settings and hashes are in run.json.\n"
    )


_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; }
img { max-width: 100%; background: #fff; }
"""


def report(data: TaskData, results: dict, folder: Path) -> str:
    """report.html: one file without network access, light and dark."""
    import base64

    def table(header: tuple[str, ...], rows: list[tuple]) -> str:
        cells = "".join(f"<th>{html.escape(h)}</th>" for h in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        return f"<table><tr>{cells}</tr>{body}</table>"

    picture = folder / "curves.png"
    image = ""
    if results.get("train_steps") and picture.is_file():
        image = f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
    title = f"{data.task.name}: {results['model_name_or_path']}"
    flat = [(k, v) for k, v in results.items() if not isinstance(v, dict)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p>Data: {html.escape(data.source)}</p>"
        + table(("run", f"{data.task.headline} x100", "samples/s"), table_rows(data.task, results))
        + image
        + "<h2>All results</h2>"
        + table(("name", "value"), flat)
        + "<h2>Seconds</h2>"
        + table(("step", "seconds"), [(k, f"{v:.2f}") for k, v in results["seconds"].items()])
        + "</html>\n"
    )
