"""The bounds of `--expect`, which the results of a run must meet, such as mrpc.f1>=0.88."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any

from bert_glue import result_keys as keys
from bert_glue.config.values import read_number, shown
from bert_glue.errors import did_you_mean
from bert_glue.tasks import OWN, TASKS

_PATTERN = re.compile(r"(?:(?P<task>[a-z0-9]+)\.)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<sign>>=|<=|>|<)(?P<bound>\S+)")
_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
# Figures of a run that are not metrics of its task but can be bounded too.
FIGURES = (
    keys.TRAIN_LOSS, keys.TRAIN_SAMPLES_PER_SECOND, keys.TRAIN_REAL_TOKENS_PER_SECOND, keys.TRAIN_RUNTIME,
    keys.E2E_RUNTIME, keys.PEAK_MEMORY_BYTES,
)  # fmt: skip


@dataclass(frozen=True)
class Expectation:
    """One bound.

    Args:
        text: the bound as the user gave it.
        task: the task to which it applies; None: any task.
        key: entry of all_results.json.
        sign: >=, <=, > or <.
        bound: 0..1 for metrics, -1..1 for correlations, other figures in their own unit.
    """

    text: str
    task: str | None
    key: str
    sign: str
    bound: float

    @property
    def is_upper(self) -> bool:
        """Whether the figure must be low."""
        return self.sign.startswith("<")

    def judge(self, results: dict[str, Any]) -> dict[str, Any]:
        """The entries expect, value and is_met, and a reason. A figure that is null or absent misses every bound."""
        value = results.get(self.key)
        found = {"expect": self.text, "value": value, "is_met": False}
        if value is None:
            found["reason"] = results.get(keys.reason_key(self.key)) or "this run does not have this figure"
        else:
            found["is_met"] = bool(_SIGNS[self.sign](value, self.bound))
        return found


def read_expectations(text: str, task: str | None, metrics: list[str]) -> list[Expectation]:
    """The bounds of `--expect`, several separated by commas.

    Args:
        task: the run's task; None for own data.
        metrics: names of the metrics that the run's evaluation can compute.

    Raises:
        ValueError: not a bound, a bound for another task, or an unknown metric. The message is one line to print after
            the flag's name.
    """
    return [_read(part.strip(), task, metrics) for part in text.split(",")]


def _read(text: str, task: str | None, metrics: list[str]) -> Expectation:
    match = _PATTERN.fullmatch(text)
    if match is None:
        hint = "; put it in quotes, because the shell reads > as a redirection" if re.fullmatch(r"[\w.]+", text) else ""
        raise ValueError(f"{shown(text)} is not a bound such as 'mrpc.f1>=0.88'{hint}")
    name, bound = keys.without_eval(match["name"]), float(read_number(match["bound"]))
    if match["task"] and match["task"] != (task or OWN):
        known = "" if match["task"] in TASKS else f" ({did_you_mean('task', match['task'], list(TASKS))})"
        raise ValueError(f"{shown(text)} is for {match['task']}{known}, but this run's task is {task or 'own data'}")
    if name in FIGURES:
        return Expectation(text, match["task"], name, match["sign"], bound)
    if name not in metrics:
        raise ValueError(f"{shown(text)}: {did_you_mean('metric', name, [*metrics, *FIGURES])}")
    if not keys.is_loss(keys.evaluation_key(name)) and not -1.0 <= bound <= 1.0:
        raise ValueError(f"{shown(text)}: metrics are fractions of at most 1; write {bound:g} % as {bound / 100:g}")
    return Expectation(text, match["task"], keys.evaluation_key(name), match["sign"], bound)


def missed(judged: list[dict[str, Any]]) -> list[str]:
    """One line for each bound that was missed."""
    return [
        f"--expect {one['expect']}: missed, it is {'null: ' + one['reason'] if one['value'] is None else one['value']}"
        for one in judged
        if not one["is_met"]
    ]
