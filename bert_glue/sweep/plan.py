"""Plans the runs of a sweep: their flags, their folders, and how far each has come.

The folder of a run holds `sweep_run.json` with the settings of its start. A run counts as finished if its results are
complete and these settings equal the current ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import FLAGS
from bert_glue.config.files import CONFIG_SUFFIXES, SAMPLE_RECIPE, read_config, recipe_file, recipe_names, value_text
from bert_glue.config.parser import as_config, parse
from bert_glue.errors import UsageError, did_you_mean
from bert_glue.result_keys import STOPPED_BY_SIGNAL, headline_keys
from bert_glue.storage.files import RESULTS_FILE, json_object, write_json
from bert_glue.tasks import OWN, TASKS, TRAINABLE, GlueTask, own_task

SETTINGS_FILE = "sweep_run.json"
# Flags that may differ when a run is resumed, because they do not change what it computes.
_FREE = {
    "output_dir", "device", "use_cpu", "resume_from_checkpoint", "disable_tqdm", "log_level", "report_to", "run_name",
    "token", "cache_dir", "overwrite_cache", "preprocessing_num_workers", "dataloader_num_workers", "save_total_limit",
    "expect",
}  # fmt: skip
# One checkpoint per epoch, so that a killed run can continue.
_LAUNCHER = {
    "do_train": "true", "do_eval": "true", "fallback_precision": "fp32", "skip_steps": "5", "save_strategy": "epoch",
    "save_total_limit": "1",
}  # fmt: skip
_OURS = (
    "seed", "task_name", "output_dir", "device", "resume_from_checkpoint", "expect", "sample", "do_train", "do_eval",
    "recipe",
)  # fmt: skip


# The key of the hashes of own data among the settings of a run.
_DATA = "data_sha256"


@dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep.

    Args:
        task: the row of the task table.
        seed: `--seed` of the run.
        chosen: the flags besides the seed that differ between runs of one task, e.g. {"learning_rate": "2e-5"}.
        folder: `--output_dir` of the run.
        flags: the command line of run_glue.py, without the flags for the device and for resuming.
        trial: the number of the trial in a search. None in a plain sweep.
        settings: the values of all flags that decide what the run computes.
    """

    task: GlueTask
    seed: int
    chosen: dict[str, str]
    folder: Path
    flags: tuple[str, ...]
    trial: int | None = None
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """A name for log lines, such as "mrpc seed 1, learning_rate 2e-5"."""
        trial = "" if self.trial is None else f" trial {self.trial}"
        chosen = (f"{name} {_short(value)}" for name, value in self.chosen.items())
        return ", ".join([f"{self.task.name}{trial} seed {self.seed}", *chosen])

    def differences(self) -> list[str]:
        """The settings that differ from those with which the run of this folder was started. [] for a new folder."""
        stored = _read_object(self.folder / SETTINGS_FILE)
        if stored is None:
            foreign = [name for name in (RESULTS_FILE, "model.safetensors") if (self.folder / name).exists()]
            return [f"{foreign[0]} was not written by a sweep"] if foreign else []
        defaults = {name: FLAGS[name].default if name in FLAGS else None for name in self.settings}
        changed = {name: value for name, value in self.settings.items() if stored.get(name, defaults[name]) != value}
        found = [f"--{name} {stored.get(name, defaults[name])}, now {value}" for name, value in changed.items()
                 if name in FLAGS]  # fmt: skip
        if _DATA in changed:
            found.append("the texts or labels of the data have changed since")
        return found

    def is_started(self) -> bool:
        """True if an earlier sweep command started this run."""
        return (self.folder / SETTINGS_FILE).is_file()

    def results(self) -> dict[str, Any] | None:
        """`all_results.json` of a finished run, else None."""
        if not self.is_started():
            return None
        results = _read_object(self.folder / RESULTS_FILE)
        is_whole = (
            results is not None
            and STOPPED_BY_SIGNAL not in results
            and all(key in results for key in headline_keys(self.task))
        )
        return results if is_whole and results.get("seed") == self.seed else None

    def note_settings(self) -> None:
        """Writes the settings with which the run starts.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETTINGS_FILE, self.settings)


def _short(text: str) -> str:
    """Numbers with three digits; other texts unchanged."""
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text


def _read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object of a file. None if the file does not exist or is not a complete object."""
    try:
        return json_object(file)
    except (OSError, ValueError):
        return None


def tasks_of(text: str) -> list[GlueTask]:
    """The tasks of "all" or of a comma-separated list. For "own", a placeholder until the data is read.

    Raises:
        UsageError: a task is unknown or has no training data, or `own` is listed with other tasks.
    """
    names = list(TRAINABLE) if text == "all" else [part.strip() for part in text.split(",")]
    if names == [OWN]:
        return [own_task(OWN, (), ("0", "1"))]
    if OWN in names:
        raise UsageError(f"--tasks {text}: {OWN} cannot be combined with other tasks, whose data is different")
    for name in names:
        if name.lower() not in TRAINABLE:
            raise UsageError(f"--tasks: {did_you_mean('task', name.lower(), [*TRAINABLE, OWN])}")
    return [TASKS[name] for name in dict.fromkeys(name.lower() for name in names)]


def seeds_of(text: str) -> list[int]:
    """The seeds of a list such as "1,2,7" or "1-5", in order, without repetitions.

    Raises:
        UsageError: the text is not such a list.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if (
            not first.isdecimal()
            or (dash and not last.isdecimal())
            or int(last or first) - int(first) not in range(1000)
        ):
            raise UsageError(f"--seeds {text}: {part.strip()!r} is neither a seed nor a range such as 1-5")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


@dataclass(frozen=True)
class Suite:
    """The settings that all runs of a sweep share.

    Args:
        output_dir: the folder of the sweep, in which each run has its own folder.
        model: `--model_name_or_path`. None: the tiny BERT of `--sample`.
        source: the flags that choose the data.
        extra: the flags after `--`, which replace those of the recipe.
        recipe: as `--recipe` of run_glue.py. None: the defaults of run_glue.py.
        data_sha256: the hashes of own data.
    """

    output_dir: Path
    model: str | None
    source: tuple[str, ...]
    extra: tuple[str, ...] = ()
    recipe: str | None = "reference"
    data_sha256: dict[str, str] = field(default_factory=dict)

    def run(self, task: GlueTask, seed: int, chosen: dict[str, str], trial: int | None = None) -> SweepRun:
        """One run with a checked command line.

        Raises:
            UsageError: run_glue.py would refuse the command line; the error lists all problems.
        """
        recipe = self._recipe(task)
        if self.model is not None:
            recipe["model_name_or_path"] = self.model
        recipe |= {**chosen, "seed": str(seed), **({"task_name": task.name} if task.is_official else {})}
        config, given = self._given()
        clash = sorted(given & {*chosen, *_OURS, *(word[2:].partition("=")[0] for word in self.source)})
        if clash:
            raise UsageError(f"--{clash[0]} cannot follow --: it is a flag of the sweep, or the sweep sets it")
        folder = self._folder(task, seed, chosen, trial)
        # --bf16 after -- replaces the fp16 of the recipe.
        if "bf16" in given:
            given.add("fp16")
        flags = [*config, *(f"--{name}={value}" for name, value in recipe.items() if name not in given)]
        flags += [*self.source, f"--output_dir={folder}", *self.extra[len(config) :]]
        settings = {name: value for name, value in as_config(parse(flags)).items() if name not in _FREE}
        if self.data_sha256:
            settings[_DATA] = self.data_sha256
        run = SweepRun(task, seed, chosen, folder, tuple(flags), trial)
        return replace(run, settings=json.loads(json.dumps(settings)))

    def _recipe(self, task: GlueTask) -> dict[str, str]:
        """The flags of the recipe for a task, as texts, and those that every launcher adds."""
        flags = dict(_LAUNCHER)
        if self.recipe is None:
            return flags
        if self.recipe in recipe_names() and not task.is_official:
            raise UsageError(
                f"--recipe {self.recipe} has settings for GLUE tasks only, not for own data: give a .json or .yaml "
                "file, or flags after --"
            )
        for entry in read_config(recipe_file(self.recipe, task.name)):
            try:
                flags[entry.key] = value_text(entry) or "none"
            except ValueError as error:
                raise UsageError(f"{entry.where}: {entry.key}: {error}") from None
        if "--sample" in self.source and self.model is None:  # the tiny BERT has its own recipe
            flags = {name: value for name, value in flags.items() if name not in SAMPLE_RECIPE}
        return flags

    def _given(self) -> tuple[tuple[str, ...], set[str]]:
        """The config file at the beginning of `extra`, if any, and the names of all flags that `extra` sets."""
        words = [word[2:].partition("=")[0].replace("-", "_") for word in self.extra if word.startswith("--")]
        given = {word.removeprefix("no_") for word in words}
        if not self.extra or not self.extra[0].lower().endswith(CONFIG_SUFFIXES):
            return (), given
        return self.extra[:1], given | {entry.key for entry in read_config(self.extra[0])}

    def _folder(self, task: GlueTask, seed: int, chosen: dict[str, str], trial: int | None) -> Path:
        if trial is not None:
            return self.output_dir / task.name / f"trial{trial:04d}" / f"seed{seed}"
        parts = [f"seed{seed}", *(f"{name}{value}" for name, value in chosen.items())]
        return self.output_dir / task.name / "_".join(parts)


def plan(suite: Suite, tasks: list[GlueTask], seeds: list[int], rates: list[str]) -> list[SweepRun]:
    """All runs. The largest tasks come first, so that no device is left alone with a long run at the end.

    Raises:
        UsageError: a command line is wrong, or a folder holds a run with other settings.
    """
    by_size = sorted(tasks, key=lambda task: -task.rows["train"])
    choices = [{"learning_rate": rate} for rate in dict.fromkeys(rates)] or [{}]
    runs = [suite.run(task, seed, chosen) for task in by_size for chosen in choices for seed in seeds]
    refuse_other_settings(runs)
    return sorted(runs, key=lambda run: not (run.is_started() and run.results() is None))


def refuse_other_settings(runs: list[SweepRun]) -> None:
    """Refuses folders with runs of other settings, so that nothing is overwritten and no two recipes are averaged.

    Raises:
        UsageError: a run was started with other settings.
    """
    problems = [f"{run.folder}: {'; '.join(found)}" for run in runs if (found := run.differences())]
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise UsageError("\n".join([*problems[:5], *more, "choose another --output_dir, or give the earlier settings"]))
