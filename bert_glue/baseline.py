"""Baselines: what runs of a device are expected to score, and how fast; `configs/baselines/<device>.json`.

A file is `{"format": 1, "entries": [...]}`; an entry is a perf.json (perf.py) with more in its `setup` and with
`metrics`. `bert-glue check` (check.py) compares runs with it and writes it.
"""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from bert_glue import result_keys as keys
from bert_glue.collapse import collapse_reason
from bert_glue.errors import CheckpointError, MachineError, UsageError
from bert_glue.launch_results import read_results
from bert_glue.perf import FORMAT, SETUP, setup_of
from bert_glue.recipes import FOLDER as CONFIGS
from bert_glue.tasks import TASKS
from bert_glue.whole_file import json_object, write_whole

FOLDER = CONFIGS / "baselines"
# What decides a score beside the seed; of all devices and precisions the same is expected.
DECIDES_SCORES = ("task_name", "sample_data", "model", "trained", "global_batch_size", "max_seq_length",
                   "learning_rate", "epoch", keys.TRAIN_SAMPLES, keys.evaluation_key(keys.SAMPLES))  # fmt: skip
DECIDES_SPEED = (*SETUP, "model", "device")


class Group(NamedTuple):
    """Runs that differ in nothing but their seed: their setup and their results."""

    setup: dict[str, Any]
    runs: list[dict[str, Any]]

    def mean(self, key: str) -> float | None:
        """Of a figure over the runs; None unless all have it."""
        values = [run.get(key) for run in self.runs]
        return None if None in values else fmean(values)


def group_runs(folders: list[Path]) -> list[Group]:
    """The finished runs in the folders, at any depth.

    Raises:
        MachineError: there is none, or one is not of this program.
    """
    files = sorted({path.parent for folder in folders for path in folder.rglob("all_results.json")})
    if not files:
        raise MachineError(f"{', '.join(map(str, folders))}: no finished run (all_results.json)")
    groups: dict[str, Group] = {}
    for folder in files:
        results = read_results(folder)
        try:
            setup = setup_of(results)
            setup |= {name: results.get(name) for name in DECIDES_SCORES if name not in setup}
        except (KeyError, TypeError, AttributeError) as error:
            raise MachineError(f"{folder}: all_results.json is not of a run of this program ({error})") from error
        groups.setdefault(json.dumps(setup, sort_keys=True), Group(setup, [])).runs.append(results)
    return list(groups.values())


def read_entries(file: Path) -> list[dict[str, Any]]:
    """Entries of a baseline; a perf.json is one.

    Raises:
        UsageError: it cannot be read or is neither.
    """
    try:
        found = json_object(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--baseline {file}: cannot be read ({error})") from error
    entries = found.get("entries", [found]) if found.get("format") == FORMAT else None
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise UsageError(f"--baseline {file}: neither a baseline nor a perf.json of this program")
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("setup"), dict):
        return False
    metrics, speed = entry.get("metrics", {}), entry.get("samples_per_second")
    if not isinstance(metrics, dict) or not isinstance(speed, int | float | None):
        return False
    numbers = [band.get(name) for band in metrics.values() if isinstance(band, dict) for name in ("mean", "error")]
    return len(numbers) == 2 * len(metrics) and all(isinstance(number, int | float) for number in numbers)


def entry_of(group: Group, with_speed: bool, source: str) -> dict[str, Any]:
    """What a baseline holds of a group of runs.

    Returns:
        `metrics`: headline scores of each labelled split, `mean` and `error`: the deviation over the runs or the
        standard error of the evaluation, whichever is larger, in the metric's unit. `samples_per_second`: mean.

    Raises:
        UsageError: a run learned nothing.
    """
    task = TASKS.get(group.setup["task_name"])
    collapsed = [f"seed {run['seed']}" for run in group.runs if collapse_reason(run)]
    if collapsed:
        raise UsageError(f"--write: a run of {group.setup['task_name']} learned nothing ({', '.join(collapsed)})")
    metrics: dict[str, Any] = {}
    headline = group.runs[0]["headline_metric"]
    for suffix in [split.key_suffix for split in task.evaluation] if task else [""]:
        key = keys.evaluation_key(headline, suffix)
        values = [run[key] for run in group.runs if run.get(key) is not None]
        errors = [run.get(keys.standard_error_key(headline, suffix)) or 0.0 for run in group.runs]
        if values:
            spread = stdev(values) * sqrt(1 + 1 / len(values)) if len(values) > 1 else 0.0
            # None wrong of n may be 3/n of all (rule of three, Hanley and Lippman-Hand 1983): two errors.
            least = 1.5 / (group.runs[0].get(keys.evaluation_key(keys.SAMPLES)) or 1000)
            metrics[headline + suffix] = {
                "mean": fmean(values),
                "error": max(spread, least, *errors),
                "runs": len(values),
            }
    speed = group.mean(keys.TRAIN_SAMPLES_PER_SECOND) if with_speed else None
    return {"setup": group.setup, "metrics": metrics, "samples_per_second": speed, "source": source}


def write_entries(file: Path, new: list[dict[str, Any]]) -> list[str]:
    """Add entries to a baseline, in the place of those with the same setup; returns lines on what was done.

    Raises:
        UsageError: the file is there and is no baseline.
        CheckpointError: it cannot be written.
    """
    old = read_entries(file) if file.exists() else []
    setups = [entry["setup"] for entry in new]
    kept = [entry for entry in old if entry["setup"] not in setups]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"format": FORMAT, "entries": [*kept, *new]}, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"--write {file}: {error.strerror}") from error
    return [f"wrote {file}: {len(new)} new, {len(old) - len(kept)} replaced, {len(kept)} kept"]
