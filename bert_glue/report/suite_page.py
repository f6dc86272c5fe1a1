"""One page for many runs: each task, model and setting over its seeds, and settings compared seed by seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, stdev

from bert_glue import result_keys as keys
from bert_glue.config.arguments import EvaluationArguments, ModelArguments, PrecisionArguments, TrainingArguments
from bert_glue.errors import MachineError
from bert_glue.evaluation.collapse import collapse_reason
from bert_glue.report.charts import SeedChart, SeedRow, number, seed_chart
from bert_glue.report.page import render, shortened
from bert_glue.report.run_page import task_of
from bert_glue.report.words import Verdict
from bert_glue.results.model_card import last_part, task_title, without_folders
from bert_glue.results.records import Record, as_text, read_record
from bert_glue.storage.files import RECORD_FILE, RESULTS_FILE, read_json_object
from bert_glue.tasks import TASKS, GlueTask

# Flags that say where a model is found and how it is read, not what is trained.
_NOT_SETTINGS = {
    "model_name_or_path", "tokenizer_name", "config_name", "cache_dir", "hub", "token", "trust_remote_code",
    "allow_pickle_weights",
}  # fmt: skip
_GROUPS = (ModelArguments, TrainingArguments, EvaluationArguments, PrecisionArguments)
_SETTINGS = {found.name for group in _GROUPS for found in fields(group)} - _NOT_SETTINGS
_SETTINGS |= {"recipe", "max_seq_length", "doc_stride", "max_windows", "padding", "pad_to_max_length"}
_SETTINGS |= {"max_train_samples", "max_eval_samples"}
_SETTINGS |= {"label_column_name", "label_map", "drop_rows", "drop_broken_rows", "do_regression", "remove_columns"}
_SETTINGS |= {"text_column_delimiter", "validation_split_percentage", "problem_type", "label_delimiter"}
_SETTINGS |= {"label_threshold"}
# Values that the results contain, so they are known even without run.json.
_FROM_RESULTS = ("learning_rate", "precision", "global_batch_size", "world_size", "max_seq_length", "trained")
# Shown with every setting, or part of the precision.
_SHOWN_ANYWAY = {"learning_rate", "recipe", "precision", "fp16", "bf16", "fp16_opt_level", "data"}


@dataclass(frozen=True)
class SuiteRun:
    """One finished run.

    Args:
        value: headline metric of the first evaluated split, 0..1 (correlations -1..1); None if there is none.
        majority: the metric of the most frequent class; None if unknown.
    """

    folder: Path
    results: Record
    origin: Record
    value: float | None
    majority: float | None

    @property
    def has_collapsed(self) -> bool:
        """Whether the run learned nothing."""
        return collapse_reason(self.results.values) is not None

    @property
    def task(self) -> GlueTask:
        """The row of the task, or a substitute for own data."""
        return task_of(self.results)

    @property
    def seed(self) -> float | None:
        """The seed, if the results have one."""
        return self.results.number("seed")

    def setting(self) -> dict[str, str]:
        """Everything but the seed that can change the score, as texts by name."""
        arguments = self.origin.part("arguments").values
        found = {name: as_text(arguments[name]) for name in sorted(_SETTINGS & arguments.keys())}
        found |= {name: as_text(self.results.values.get(name)) for name in _FROM_RESULTS}
        return found | {"data": without_folders(self.results.text("data"))}


@dataclass(frozen=True)
class Found:
    """The runs found in the folders.

    Args:
        unfinished: output folders without results.
        unreadable: (folder, reason).
    """

    runs: list[SuiteRun]
    unfinished: list[Path]
    unreadable: list[tuple[Path, str]]


def find_runs(folders: list[Path]) -> Found:
    """Runs in the folders, at any depth.

    Raises:
        MachineError: there is no finished run.
    """
    finished = sorted({path.parent for folder in folders for path in folder.rglob(RESULTS_FILE)})
    begun = {path.parent for folder in folders for path in folder.rglob(".lock")}
    unfinished = sorted(path for path in begun - set(finished) if not any(path in run.parents for run in finished))
    runs, unreadable = [], []
    for folder in finished:
        try:
            runs += _read(folder)
        except MachineError as error:
            unreadable.append((folder, str(error)))
    if not runs:
        reasons = "".join(f"\n{reason}" for _, reason in unreadable)
        raise MachineError(f"{', '.join(map(str, folders))}: no run with an evaluation (all_results.json){reasons}")
    return Found(runs, unfinished, unreadable)


def _read(folder: Path) -> list[SuiteRun]:
    """The run, if it evaluated."""
    results = Record(read_json_object(folder / RESULTS_FILE), f"{folder} all_results.json")
    key = keys.headline_key_of(results.values)
    if key not in results or not results.text("task_name"):
        return []
    origin = read_record(folder, RECORD_FILE)
    return [
        SuiteRun(
            folder, results, origin, results.number(key), results.number(keys.evaluation_key(keys.MAJORITY_BASELINE))
        )
    ]


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed only.

    Args:
        differs: (flag, value) pairs that distinguish it from the other settings of its task and model.
    """

    runs: list[SuiteRun]
    differs: list[tuple[str, str]]

    @property
    def model(self) -> str:
        """Name without folders."""
        return last_part(self.runs[0].results.text("model_name_or_path", "?"))

    @property
    def rate(self) -> str:
        """Learning rate."""
        value = self.runs[0].results.number("learning_rate")
        return "" if value is None else number(value)

    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        return last_part(self.runs[0].origin.part("arguments").text("recipe"))

    @property
    def precision(self) -> str:
        """The precision as the run names it."""
        return self.runs[0].results.text("precision")

    @property
    def label(self) -> str:
        """One line of text for a chart."""
        parts = [
            self.model,
            self.rate,
            self.recipe,
            self.precision,
            *(f"{name} {value}" for name, value in self.differs),
        ]
        return shortened(", ".join(filter(None, parts)), 60)

    @property
    def values(self) -> list[float]:
        """Points x100 of the runs that have a value."""
        return [100 * run.value for run in self.runs if run.value is not None]

    @property
    def mean(self) -> float | None:
        """Points."""
        return fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Points; None for a single seed."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean, points."""
        return interval(self.values)

    @property
    def majority(self) -> float | None:
        """Points of the most frequent class."""
        return next((100 * run.majority for run in self.runs if run.majority is not None), None)

    @property
    def collapsed(self) -> int:
        """The number of runs that learned nothing."""
        return sum(run.has_collapsed for run in self.runs)

    def mean_of(self, key: str) -> float | None:
        """Mean of a number of the results over the runs that have it."""
        found = [value for run in self.runs if (value := run.results.number(key))]
        return fmean(found) if found else None

    def by_seed(self) -> dict[float, float]:
        """Points of each seed; the mean if a seed ran more than once."""
        found: dict[float, list[float]] = {}
        for run in self.runs:
            if run.seed is not None and run.value is not None:
                found.setdefault(run.seed, []).append(100 * run.value)
        return {seed: fmean(values) for seed, values in found.items()}


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean; None for fewer than two values."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return None
    reach = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - reach, fmean(values) + reach


@dataclass(frozen=True)
class Paired:
    """A setting compared with the best one of its task, over the common seeds.

    Args:
        difference: mean over the seeds, points.
    """

    setting: Setting
    best: Setting
    seeds: int
    difference: float | None
    interval: tuple[float, float] | None
    verdict: Verdict


def paired(setting: Setting, best: Setting) -> Paired:
    """Compares two settings over their common seeds."""
    mine, theirs = setting.by_seed(), best.by_seed()
    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    ends = interval(differences)
    if ends is None:
        verdict = Verdict.TOO_FEW
    elif ends[0] <= 0.0 <= ends[1]:
        verdict = Verdict.WITHIN
    else:
        verdict = Verdict.HIGHER if ends[0] > 0.0 else Verdict.LOWER
    return Paired(setting, best, len(differences), fmean(differences) if differences else None, ends, verdict)


@dataclass(frozen=True)
class TaskGroup:
    """Settings of one task on one kind of data."""

    title: str
    is_sample: bool
    metric: str
    settings: list[Setting]
    published: tuple[float, ...]

    @property
    def best(self) -> Setting | None:
        """The setting with the highest mean, if there are several settings."""
        scored = [setting for setting in self.settings if setting.mean is not None]
        return max(scored, key=lambda setting: setting.mean) if len(scored) > 1 else None

    @property
    def pairs(self) -> list[Paired]:
        """Every setting with scores, compared with the best one."""
        best = self.best
        return [paired(one, best) for one in self.settings if best and one is not best and one.mean is not None]

    @property
    def chart(self) -> SeedChart | None:
        """The chart of the seeds of all settings; None if no run has a value."""
        scored = [setting for setting in self.settings if setting.values]
        rows = [SeedRow(one.label, _dots(one), one.mean, one.interval) for one in scored]
        majority = next((one.majority for one in scored if one.majority is not None), None)
        return seed_chart(rows, self.published, majority) if rows else None


def _dots(setting: Setting) -> tuple[tuple[float, bool], ...]:
    return tuple((100 * run.value, run.has_collapsed) for run in setting.runs if run.value is not None)


def task_groups(runs: list[SuiteRun]) -> list[TaskGroup]:
    """Runs by task, model and setting, tasks in GLUE's order."""
    by_task: dict[tuple, list[SuiteRun]] = {}
    for run in sorted(runs, key=_order):
        key = (
            task_title(run.task, run.origin.part("arguments")),
            run.results.flag("sample_data"),
            run.results.text("headline_metric"),
        )
        by_task.setdefault(key, []).append(run)
    groups = []
    for (title, is_sample, metric), members in by_task.items():
        task = members[0].task
        published = () if is_sample else tuple(run.scores[0] for run in task.published)
        groups.append(TaskGroup(title, is_sample, metric, _settings(members), published))
    return groups


def _order(run: SuiteRun) -> tuple:
    names = list(TASKS)
    name = run.results.text("task_name")
    at = names.index(name) if name in names else len(names)
    return at, name, run.results.text("model_name_or_path"), run.seed or 0, str(run.folder)


def _settings(runs: list[SuiteRun]) -> list[Setting]:
    """Runs of one task by model and setting."""
    by_model: dict[str, list[tuple[dict[str, str], SuiteRun]]] = {}
    for run in runs:
        by_model.setdefault(last_part(run.results.text("model_name_or_path")), []).append((run.setting(), run))
    settings = []
    for members in by_model.values():
        varying = _varying(setting for setting, _ in members)
        by_setting: dict[tuple, list[SuiteRun]] = {}
        for setting, run in members:
            by_setting.setdefault(tuple((name, setting.get(name, "-")) for name in varying), []).append(run)
        for values, found in by_setting.items():
            settings.append(Setting(found, [pair for pair in values if pair[0] not in _SHOWN_ANYWAY]))
    return settings


def _varying(settings: Iterable[dict[str, str]]) -> list[str]:
    """Names whose values differ between runs."""
    found = list(settings)
    names = dict.fromkeys(name for setting in found for name in setting)
    return [name for name in names if len({setting.get(name, "-") for setting in found}) > 1]


def suite_page(found: Found) -> str:
    """report.html for the runs."""
    groups = task_groups(found.runs)
    return render(
        "suite.html",
        title=f"{shortened(', '.join(group.title for group in groups), 60)}: {len(found.runs)} runs",
        groups=groups,
        runs=found.runs,
        tasks=len(groups),
        seconds=sum(run.results.number(keys.E2E_RUNTIME) or 0.0 for run in found.runs),
        unfinished=found.unfinished,
        unreadable=found.unreadable,
        ignored=[name for run in found.runs for name in dict.fromkeys(run.results.ignored + run.origin.ignored)],
    )
