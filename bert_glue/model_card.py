"""README.md of a saved model: what it is, the data and recipe it comes from, its results and hashes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bert_glue.arguments import FLAGS
from bert_glue.launch_results import SAMPLE_NOTE
from bert_glue.tasks import GlueTask

if TYPE_CHECKING:
    from bert_glue.sources import TaskData

# Flags that say where a run took place, not what the model became.
_NOT_RECIPE = {"model_name_or_path", "output_dir", "cache_dir", "data_path", "token", "report_to", "run_name"}


def table_rows(task: GlueTask, results: dict) -> list[tuple[str, str, str]]:
    """(where, score x100, samples/s) of this run and of the published ones, this run first."""
    keys = [f"eval_{task.headline}{suffix}" for _, suffix, _ in task.evaluation]
    own = [results[key] for key in keys if results.get(key) is not None]
    label = "this run" + (f" ({SAMPLE_NOTE})" if results["sample_data"] else "")
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


def model_card(data: TaskData, results: dict, origin: dict) -> str:
    """The card as Markdown, with the metadata that the hub reads.

    Args:
        origin: content of run.json.
    """
    rows = "\n".join(f"| {where} | {score} | {speed} |" for where, score, speed in table_rows(data.task, results))
    sample = f"\n**{SAMPLE_NOTE}**: this model is a demonstration.\n" if results["sample_data"] else ""
    return (
        f"{_metadata(results)}# {results['model_name_or_path']} fine-tuned on {data.task.name}\n{sample}\n"
        f"Data: {data.source}. Precision: {results['precision']}. Batches: {results['batches']}. "
        f"Device: {results['device_name']}, {results['world_size']} rank(s). Seed {results['seed']}.\n\n"
        f"Reads: {', '.join(data.task.columns)}. Answers: {', '.join(data.task.labels) or 'a score'}.\n\n"
        f"## Results\n\n| run | {data.task.headline} x100 | samples/s |\n|---|---|---|\n{rows}\n\n"
        f"{_errors(data.task, results)}One seed is noise: compare means over several.\n\n"
        f"## Recipe\n\nFlags that differ from their defaults:\n\n{_recipe(origin['arguments'])}\n"
        f"## Hashes (SHA-256)\n\n{_hashes(origin)}\nVersions and the whole command line are in run.json.\n"
    )


def _metadata(results: dict) -> str:
    tags = [
        "text-classification",
        "bert_glue",
        results["task_name"],
        *(["sample-data"] if results["sample_data"] else []),
    ]
    lines = "".join(f"- {tag}\n" for tag in tags)
    return f"---\nlibrary_name: transformers\npipeline_tag: text-classification\ntags:\n{lines}---\n\n"


def _errors(task: GlueTask, results: dict) -> str:
    keys = [f"eval_{task.headline}_standard_error{suffix}" for _, suffix, _ in task.evaluation]
    found = [f"{100 * results[key]:.2f}" for key in keys if results.get(key) is not None]
    return f"Standard error of this run's score: {' / '.join(found)} points. " if found else ""


def _recipe(settings: dict) -> str:
    changed = {
        name: settings[name]
        for name, flag in FLAGS.items()
        if name in settings and name not in _NOT_RECIPE and settings[name] != flag.default
    }
    return "".join(f"- `--{name} {value}`\n" for name, value in changed.items())


def _hashes(origin: dict) -> str:
    hashes = {"model.safetensors": origin["weights_sha256"], **origin["data"]["sha256"]}
    return "".join(f"- {name}: `{value}`\n" for name, value in hashes.items() if value)
