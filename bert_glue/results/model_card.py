"""Writes README.md, the card of a saved model: its task, data and recipe, results and hashes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_glue.config.arguments import FLAGS
from bert_glue.config.values import is_hub_name, is_path
from bert_glue.result_keys import (
    SAMPLES,
    TRAIN_SAMPLES_PER_SECOND,
    WINDOWED_ROWS,
    evaluation_key,
    headline_keys,
    standard_error_key,
    training_key,
)
from bert_glue.results.records import Record
from bert_glue.tasks import SAMPLE_NOTE, GlueTask

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment
    from markupsafe import Markup

    from bert_glue.data.sources import TaskData

# Flags about where a run took place, which do not change the model.
_NOT_RECIPE = {
    "model_name_or_path", "output_dir", "cache_dir", "data_path", "token", "report_to", "run_name", "push_to_hub",
    "hub_model_id", "hub_token", "hub_private_repo", "do_train", "do_eval", "do_predict", "explain", "logging_steps",
    "logging_first_step", "log_level", "disable_tqdm", "save_strategy", "save_steps", "save_total_limit", "expect",
}  # fmt: skip
_DATA_FLAGS = ("train_file", "validation_file", "dataset_name", "data_path")
_GLUE = "nyu-mll/glue"
# Metrics whose name on the hub differs from ours.
_HUB_METRICS = {
    "pearson": "pearsonr", "f1_micro": "f1", "f1_macro": "f1", "f1_samples": "f1", "subset_accuracy": "accuracy",
}  # fmt: skip
# This program makes the weights of the sample.
_OWN_LICENCE = "apache-2.0"
_NO_LICENCE = {"license": "other", "license_name": "that-of-the-base-model"}
# Characters that Markdown or HTML could read as markup. Hyphens, dots and hashes are harmless inside a line.
_MARKUP = re.compile(r"""[&<>"'`*\[\]\\|~$@{}!]|(?<!\w)_|_(?!\w)|(?<=\w):(?=//)|(?<=www)\.""", re.IGNORECASE)


def short_name(name: str) -> str:
    """The hub name of a model, or only the last folder of a path, because a card may be published."""
    return last_part(name) if is_path(name) else name


def without_folders(text: str) -> str:
    """The text with each absolute path shortened to its last part."""
    return re.sub(r"(?<!\S)[/~]\S*/(?=[^/\s])", "", text)


def last_part(name: str) -> str:
    """The last part of a path or hub name, for titles and tables."""
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def task_title(task: GlueTask, arguments: Record) -> str:
    """The name of a GLUE task as its authors write it. For own data, the name of the file or data set.

    Args:
        arguments: the arguments in run.json.
    """
    if task.is_official:
        return task.folder
    given = next(filter(None, map(arguments.text, _DATA_FLAGS)), "")
    return re.sub(r"\.\w{1,8}$", "", last_part(given)) or task.name


def plain(value: object) -> str:
    """The text on one line, escaped so that Markdown shows it literally."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(str(value).split()))


def _code(value: object) -> Markup:
    """The text as Markdown code. A text that needs escaping stays plain, because code cannot hold escapes."""
    from markupsafe import Markup

    text = plain(value)
    return Markup(f"`{text}`" if text == str(value) else text)


def model_card(data: TaskData, results: dict, origin: dict) -> str:
    """The card as Markdown, with the metadata that the hub reads.

    Args:
        origin: the content of run.json.
    """
    from huggingface_hub import ModelCard

    task, base = data.task, short_name(results["model_name_or_path"])
    body = _environment().get_template("model_card.md").render(
        task=task,
        title=task_title(task, Record(origin["arguments"])),
        base=base,
        results=results,
        source=without_folders(data.source),
        rows=table_rows(task, results),
        errors=_errors(task, results),
        other_rows=None if results["sample_data"] else other_rows(task, results),
        recipe=_recipe(origin["arguments"]),
        hashes={"model.safetensors": origin["weights_sha256"], **origin["data"]["sha256"]},
        sample_note=SAMPLE_NOTE if results["sample_data"] else "",
        windows=windows_text(Record(results)),
    )  # fmt: skip
    metadata = _metadata(task, results, origin["arguments"]).to_yaml()
    return str(ModelCard(f"---\n{metadata}\n---\n\n{body}"))


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        # Every value that the template shows is escaped for Markdown instead of HTML.
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["code"] = _code
    return found


def table_rows(task: GlueTask, results: dict) -> list[tuple[str, str, str]]:
    """(where, score x100, samples/s) of this run, followed by the published runs."""
    own = [results[key] for key in headline_keys(task) if results.get(key) is not None]
    label = "this run" + (f" ({SAMPLE_NOTE})" if results["sample_data"] else "")
    rows = [(f"{label}, {results['device_name']}", _percent(own, 100.0), _rate(results))]
    for run in task.published:
        speed = f"{run.samples_per_second:g}" if run.samples_per_second else "-"
        rows.append((f"published: {run.where}, {run.epochs} epochs", _percent(run.scores, 1.0), speed))
    return rows


def _percent(values: Iterable[float], factor: float) -> str:
    return " / ".join(f"{value * factor:.2f}" for value in values) or "-"


def _rate(results: dict) -> str:
    rate = results.get(TRAIN_SAMPLES_PER_SECOND)
    return "-" if rate is None else f"{rate:.1f}"


def other_rows(task: GlueTask, results: dict) -> tuple[int, int] | None:
    """(scored rows, rows in GLUE) of the first split where they differ. None if every row of GLUE was scored."""
    for split in task.evaluation:
        rows, official = results.get(evaluation_key(SAMPLES, split.key_suffix)), task.rows.get(split.name)
        if rows is not None and official and rows != official:
            return rows, official
    return None


def windows_text(results: Record) -> str:
    """A sentence on how long texts were read with `--doc_stride`, and how many there were. "" without the flag."""
    stride, length = results.number("doc_stride"), results.number("max_seq_length")
    if stride is None or length is None:
        return ""
    counts = [
        f"{count:,.0f} rows of {part}"
        for part, key in (("training", training_key(WINDOWED_ROWS)), ("evaluation", evaluation_key(WINDOWED_ROWS)))
        if (count := results.number(key)) is not None
    ]
    return (
        f"Texts longer than {length:g} tokens are read in at most {results.number('max_windows') or 0:g} windows, "
        f"which overlap by {stride:g} tokens, and the logits are the mean over the windows"
        + (f" ({', '.join(counts)})." if counts else ".")
    )


def _errors(task: GlueTask, results: dict) -> str:
    """Standard errors of the scores, in points."""
    keys = [standard_error_key(task.headline, split.key_suffix) for split in task.evaluation]
    return " / ".join(f"{100 * results[key]:.2f}" for key in keys if results.get(key) is not None)


def _recipe(settings: dict) -> list[tuple[str, str]]:
    """(flag, value) of each flag that differs from its default."""
    return [
        (f"--{name}", without_folders(str(settings[name])))
        for name, flag in FLAGS.items()
        if name in settings and name not in _NOT_RECIPE and settings[name] != flag.default
    ]


# Metadata


def _metadata(task: GlueTask, results: dict, arguments: dict[str, Any]) -> ModelCardData:
    from huggingface_hub import ModelCardData

    is_sample, base = results["sample_data"], results["model_name_or_path"]
    inherited = {"license": _OWN_LICENCE} if is_sample else _of_base(base)
    if task.is_official:
        inherited["language"] = "en"
    dataset = _GLUE if task.is_official else arguments.get("dataset_name") or ""
    title = task_title(task, Record(arguments))
    evaluated = _eval_results(task, title, results, dataset)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=base if _is_hub_name(base) else None,
        datasets=[dataset] if _is_hub_name(dataset) and not is_sample else None,
        tags=["text-classification", "bert_glue", _identifier(task.name), *(["sample-data"] if is_sample else [])],
        metrics=list(dict.fromkeys(result.metric_type for result in evaluated)) or None,
        model_name=_identifier(f"{last_part(base)}-{title}"),
        eval_results=evaluated or None,
        **inherited,
    )


def _is_hub_name(name: str) -> bool:
    return is_hub_name(name) and not Path(name).exists()


def _identifier(text: str) -> str:
    """The text as an identifier, which readers of the metadata cannot mistake for anything else."""
    return re.sub(r"[^\w./-]+", "-", text).strip("-")[:100] or "model"


def _eval_results(task: GlueTask, title: str, results: dict, dataset: str) -> list[EvalResult]:
    """The scores, for the model-index in the metadata."""
    from huggingface_hub import EvalResult

    if results["sample_data"]:
        where = {"dataset_type": "generated", "dataset_name": SAMPLE_NOTE}
    elif task.is_official:
        where = {"dataset_type": _GLUE, "dataset_name": f"GLUE {task.folder}", "dataset_config": task.name}
    else:
        name = _identifier(dataset or title)
        where = {"dataset_type": name, "dataset_name": name}
    figures = [
        (split.name, metric, results.get(evaluation_key(metric, split.key_suffix)))
        for split in task.evaluation
        for metric in task.metrics
    ]
    return [
        EvalResult(
            task_type="text-classification",
            dataset_split=split,
            metric_type=_HUB_METRICS.get(metric, metric),
            metric_value=value,
            metric_name=metric,
            **where,
        )
        for split, metric, value in figures
        if value is not None
    ]


def _of_base(base: str) -> dict[str, Any]:
    """Licence and language from the card of the base model, if this machine has it."""
    import yaml
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = None if Path(base).exists() else try_to_load_from_cache(base, "README.md")
        card = ModelCard.load(
            cached if isinstance(cached, str) else Path(base) / "README.md", ignore_metadata_errors=True
        )
        given = card.data.to_dict()
    except (OSError, ValueError, HFValidationError, yaml.YAMLError):
        given = {}
    names = ("license", "license_name", "license_link") if _is_name(given.get("license")) else ()
    found = {name: given[name] for name in names if isinstance(given.get(name), str)} or dict(_NO_LICENCE)
    language = given.get("language")
    if _is_name(language) or isinstance(language, list) and all(map(_is_name, language)):
        found["language"] = language
    return found


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{1,40}", value, re.ASCII) is not None
