"""Which runs a sweep consists of, where each lives, and how far it came.

A run's folder holds `sweep_run.json`, the settings it was started with. A run counts as finished if its
results are there, complete, and those settings are the present ones.
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
from bert_glue.result_keys import headline_keys
from bert_glue.storage.files import RESULTS_FILE, json_object, write_json
from bert_glue.tasks import OWN, TASKS, TRAINABLE, GlueTask, own_task

SETTINGS_FILE = "sweep_run.json"
# What may differ between the sittings of one run: where and how it is shown, not what is computed.
_FREE = {
    "output_dir", "device", "use_cpu", "resume_from_checkpoint", "disable_tqdm", "log_level", "report_to", "run_name",
    "token", "cache_dir", "overwrite_cache", "preprocessing_num_workers", "dataloader_num_workers", "save_total_limit",
    "expect",
}  # fmt: skip
# A checkpoint an epoch lets a killed run go on.
_LAUNCHER = {
    "do_train": "true", "do_eval": "true", "fallback_precision": "fp32", "skip_steps": "5", "save_strategy": "epoch",
    "save_total_limit": "1",
}  # fmt: skip
_OURS = (
    "seed", "task_name", "output_dir", "device", "resume_from_checkpoint", "expect", "sample", "do_train", "do_eval",
    "recipe",
)  # fmt: skip


# Among the settings of a run on own data: hashes of its splits.
_DATA = "data_sha256"


@dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep.

    Args:
        task: row of the task table.
        seed: of the run.
        chosen: flags that distinguish runs of one task beside the seed, e.g. {"learning_rate": "2e-5"}.
        folder: its `--output_dir`.
        flags: command line of run_glue.py, without device and resuming.
        trial: number in a search; None in a plain sweep.
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
        """Such as "mrpc seed 1, learning_rate 2e-5"."""
        trial = "" if self.trial is None else f" trial {self.trial}"
        chosen = (f"{name} {_short(value)}" for name, value in self.chosen.items())
        return ", ".join([f"{self.task.name}{trial} seed {self.seed}", *chosen])

    def differences(self) -> list[str]:
        """What was set otherwise when this folder's run was started; [] for a new folder, too."""
        stored = _read_object(self.folder / SETTINGS_FILE)
        if stored is None:
            foreign = [name for name in (RESULTS_FILE, "model.safetensors") if (self.folder / name).exists()]
            return [f"{foreign[0]} is not of a sweep"] if foreign else []
        defaults = {name: FLAGS[name].default if name in FLAGS else None for name in self.settings}
        changed = {name: value for name, value in self.settings.items() if stored.get(name, defaults[name]) != value}
        found = [f"--{name} {stored.get(name, defaults[name])}, now {value}" for name, value in changed.items()
                 if name in FLAGS]  # fmt: skip
        if _DATA in changed:
            found.append("the texts or labels of the data have changed since")
        return found

    def is_started(self) -> bool:
        """True if an earlier sitting began this run."""
        return (self.folder / SETTINGS_FILE).is_file()

    def results(self) -> dict[str, Any] | None:
        """`all_results.json` if the run came to its end, else None."""
        if not self.is_started():
            return None
        results = _read_object(self.folder / RESULTS_FILE)
        is_whole = (
            results is not None
            and "stopped_by_signal" not in results
            and all(key in results for key in headline_keys(self.task))
        )
        return results if is_whole and results.get("seed") == self.seed else None

    def note_settings(self) -> None:
        """Write down what this run is started with.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETTINGS_FILE, self.settings)


def _short(text: str) -> str:
    """A number to three digits; anything else as it is."""
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text


def _read_object(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or half of one."""
    try:
        return json_object(file)
    except (OSError, ValueError):
        return None


def tasks_of(text: str) -> list[GlueTask]:
    """Tasks of "all" or a comma-separated list; of "own" a stand-in until the data is read.

    Raises:
        UsageError: no task, one without training data, or own data beside others.
    """
    names = list(TRAINABLE) if text == "all" else [part.strip() for part in text.split(",")]
    if names == [OWN]:
        return [own_task(OWN, (), ("0", "1"))]
    if OWN in names:
        raise UsageError(f"--tasks {text}: {OWN} goes alone, because its flags name other data than the tasks have")
    for name in names:
        if name.lower() not in TRAINABLE:
            raise UsageError(f"--tasks: {did_you_mean('task', name.lower(), [*TRAINABLE, OWN])}")
    return [TASKS[name] for name in dict.fromkeys(name.lower() for name in names)]


def seeds_of(text: str) -> list[int]:
    """Seeds of "1,2,7" or "1-5", in order, each once.

    Raises:
        UsageError: not such a list.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if (
            not first.isdecimal()
            or (dash and not last.isdecimal())
            or int(last or first) - int(first) not in range(1000)
        ):
            raise UsageError(f"--seeds: {part.strip()!r} is neither a seed nor a range such as 1-5")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


@dataclass(frozen=True)
class Suite:
    """What all runs of a sweep share.

    Args:
        output_dir: of the sweep; each run has a folder in it.
        model: `--model_name_or_path`; None with `--sample` for the tiny BERT.
        source: flags that choose the data.
        extra: flags behind `--`; they go before all others.
        recipe: as `--recipe` of run_glue.py; None: the defaults of run_glue.py.
        data_sha256: hashes of own data, which all runs share.
    """

    output_dir: Path
    model: str | None
    source: tuple[str, ...]
    extra: tuple[str, ...] = ()
    recipe: str | None = "reference"
    data_sha256: dict[str, str] = field(default_factory=dict)

    def run(self, task: GlueTask, seed: int, chosen: dict[str, str], trial: int | None = None) -> SweepRun:
        """One run, its command line checked.

        Raises:
            UsageError: run_glue.py would refuse it; all problems.
        """
        recipe = self._recipe(task)
        if self.model is not None:
            recipe["model_name_or_path"] = self.model
        recipe |= {**chosen, "seed": str(seed), **({"task_name": task.name} if task.is_official else {})}
        config, given = self._given()
        clash = sorted(given & {*chosen, *_OURS, *(word[2:].partition("=")[0] for word in self.source)})
        if clash:
            raise UsageError(f"--{clash[0]} cannot go behind --: the sweep has it, or sets it itself")
        folder = self._folder(task, seed, chosen, trial)
        # --bf16 behind -- replaces the recipe's fp16.
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
        """The flags of the recipe for a task, each as text, and those that every launcher adds."""
        flags = dict(_LAUNCHER)
        if self.recipe is None:
            return flags
        if self.recipe in recipe_names() and not task.is_official:
            raise UsageError(
                f"--recipe {self.recipe} has settings by GLUE task, none for own data: give a .json or .yaml file, or "
                "flags behind --"
            )
        for entry in read_config(recipe_file(self.recipe, task.name)):
            try:
                flags[entry.key] = value_text(entry) or "none"
            except ValueError as error:
                raise UsageError(f"{entry.where}: {entry.key}: {error}") from None
        if "--sample" in self.source and self.model is None:  # the tiny BERT has its own
            flags = {name: value for name, value in flags.items() if name not in SAMPLE_RECIPE}
        return flags

    def _given(self) -> tuple[tuple[str, ...], set[str]]:
        """The config file that `extra` may begin with, and the flags set there and behind it."""
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
    """All runs: the longest task first, so that none is left over for one device at the end.

    Raises:
        UsageError: a command line is wrong, or a folder holds a run with other settings.
    """
    by_size = sorted(tasks, key=lambda task: -task.rows["train"])
    choices = [{"learning_rate": rate} for rate in dict.fromkeys(rates)] or [{}]
    runs = [suite.run(task, seed, chosen) for task in by_size for chosen in choices for seed in seeds]
    refuse_other_settings(runs)
    return sorted(runs, key=lambda run: not (run.is_started() and run.results() is None))


def refuse_other_settings(runs: list[SweepRun]) -> None:
    """Nothing is overwritten and no two recipes are averaged.

    Raises:
        UsageError: a folder's run was started with other settings.
    """
    problems = [f"{run.folder}: {'; '.join(found)}" for run in runs if (found := run.differences())]
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise UsageError("\n".join([*problems[:5], *more, "choose another --output_dir, or the earlier settings"]))
