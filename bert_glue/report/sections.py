"""The parts of a run's page: its scores beside published ones, and its errors on single rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bert_glue import result_keys as keys
from bert_glue.report import charts
from bert_glue.report.page import shortened
from bert_glue.report.words import Verdict
from bert_glue.results.model_card import other_rows
from bert_glue.results.records import Record
from bert_glue.tasks import GlueTask

# Margin of error of a difference, in standard errors of one score. The error of a difference is sqrt(2) times that.
_MARGIN = 2.0 * 2**0.5
_MOST_PAIRS = 10
# A larger matrix shows counts without percentages, and a still larger one is not legible and left out.
_MOST_WITH_PERCENTAGES = 10
_MOST_CLASSES = 50
_LONGEST_TEXT = 600


@dataclass(frozen=True)
class Score:
    """Headline value of one evaluated split, 0..1 (correlations -1..1).

    Args:
        others: (metric, value) of the other metrics.
        reason: why there is no value, or why it should not be trusted.
        constant: prefix of the words for `majority`: "majority", or "constant" for several labels a row.
    """

    split: str
    rows: float | None
    value: float | None
    standard_error: float | None
    majority: float | None
    others: tuple[tuple[str, float], ...]
    reason: str
    constant: str = "majority"

    @property
    def is_at_majority(self) -> bool:
        """Whether predicting only the most frequent class is as good."""
        if self.value is None or self.majority is None:
            return False
        return self.value <= self.majority


def scores(task: GlueTask, results: Record, metrics: Sequence[str]) -> list[Score]:
    """The score of each split that the run evaluated.

    Args:
        metrics: names of the metrics to show, if the results have them.
    """
    headline = results.text("headline_metric")
    found = []
    for split in task.evaluation:
        suffix = split.key_suffix
        key = keys.evaluation_key(headline, suffix)
        if key not in results:
            continue
        others = [(name, results.number(keys.evaluation_key(name, suffix))) for name in metrics if name != headline]
        found.append(
            Score(
                split=split.name,
                rows=results.number(keys.evaluation_key(keys.SAMPLES, suffix)),
                value=results.number(key),
                standard_error=results.number(keys.standard_error_key(headline, suffix)),
                majority=results.number(keys.evaluation_key(keys.MAJORITY_BASELINE, suffix)),
                others=tuple((name, value) for name, value in others if value is not None),
                reason=results.text(keys.reason_key(key)),
                constant="constant" if task.is_multi_label else "majority",
            )
        )
    return found


# Beside published figures


@dataclass(frozen=True)
class ComparedRow:
    """A row of the comparison: a published run, or the most frequent class.

    Args:
        values, differences: one per split, in 0..1.
        verdicts: one per split; empty if the figures cannot be compared.
    """

    where: str
    epochs: int | None
    values: tuple[float | None, ...]
    differences: tuple[float | None, ...]
    verdicts: tuple[Verdict | None, ...]
    speed: float | None

    @property
    def styled(self) -> list[tuple[float | None, str]]:
        """(value, CSS class) of each split, for the picture of the row."""
        styles = [verdict.style if verdict else "soft" for verdict in self.verdicts]
        return list(zip(self.values, styles, strict=False))

    @property
    def distinct_verdicts(self) -> list[Verdict]:
        """Each verdict once."""
        return [verdict for verdict in dict.fromkeys(self.verdicts) if verdict]


@dataclass(frozen=True)
class Comparison:
    """A run beside published ones.

    Args:
        counts: for each split, the number of published figures with each verdict; empty if not comparable.
        other_rows: (rows evaluated, GLUE's) if they differ.
        picture: None if nothing can be drawn.
    """

    counts: list[tuple[Score, list[tuple[Verdict, int]]]]
    rows: list[ComparedRow]
    other_rows: tuple[int, int] | None
    picture: charts.Strip | None


def comparison(task: GlueTask, results: Record, found: list[Score]) -> Comparison | None:
    """The section; None if nothing was published or evaluated, or if the data is the sample."""
    if not task.published or not found or results.flag("sample_data"):
        return None
    samples = [keys.evaluation_key(keys.SAMPLES, split.key_suffix) for split in task.evaluation]
    other = other_rows(task, {key: results.number(key) for key in samples})
    published = [
        _compared(run.where, run.epochs, [score / 100 for score in run.scores], run.samples_per_second, found, other)
        for run in task.published
    ]
    rows = list(published)
    majority = [score.majority for score in found]
    if any(value is not None for value in majority):
        rows.insert(0, _compared("", None, majority, None, found, None))
    if other:
        return Comparison([], rows, other, None)
    counts = [(score, _verdict_counts(at, published)) for at, score in enumerate(found)]
    return Comparison(counts, rows, None, _picture(found, published))


def _compared(
    where: str,
    epochs: int | None,
    values: Sequence[float | None],
    speed: float | None,
    found: list[Score],
    other: tuple[int, int] | None,
) -> ComparedRow:
    differences: list[float | None] = []
    verdicts: list[Verdict | None] = []
    if not other:
        for score, value in zip(found, values, strict=False):
            differences.append(_difference(score.value, value))
            verdicts.append(_verdict(score, value))
    return ComparedRow(where, epochs, tuple(values), tuple(differences), tuple(verdicts), speed)


def _difference(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or theirs is None else mine - theirs


def _verdict(score: Score, theirs: float | None) -> Verdict | None:
    difference = _difference(score.value, theirs)
    if difference is None or score.standard_error is None:
        return None
    if abs(difference) <= _MARGIN * score.standard_error:
        return Verdict.WITHIN
    return Verdict.HIGHER if difference > 0 else Verdict.LOWER


def _verdict_counts(at: int, published: list[ComparedRow]) -> list[tuple[Verdict, int]]:
    """How often each verdict occurs for split number `at`."""
    counts = Counter(row.verdicts[at] for row in published if at < len(row.verdicts))
    return [(verdict, counts[verdict]) for verdict in Verdict if counts[verdict]]


def _picture(found: list[Score], published: list[ComparedRow]) -> charts.Strip | None:
    zones = [_zone(score) for score in found]
    # The scale leaves out the most frequent class, which is often far away. Its dot may lie at the end.
    others = [value for row in published for value in row.values if value is not None]
    return charts.strip(zones, others) if any(zones) else None


def _zone(score: Score) -> tuple[float, float, float] | None:
    if score.value is None or score.standard_error is None:
        return None
    reach = _MARGIN * score.standard_error
    return score.value - reach, score.value, score.value + reach


# Single rows


@dataclass(frozen=True)
class ClassRow:
    """Precision, recall and F1 of one class, 0..1; None if there are no rows to compute them from.

    Args:
        predicted: rows that the model assigned to the class; None if each row has one class.
    """

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    rows: int
    predicted: int | None = None


@dataclass(frozen=True)
class ConfusedPair:
    """Rows of `label` that were classified as `prediction`. `share` is of the label's rows; None if unknown."""

    label: str
    prediction: str
    rows: int
    share: float | None


@dataclass(frozen=True)
class Classes:
    """The results of a split by class; any part may be empty.

    Args:
        rows: sorted by F1, lowest first.
        macro: mean precision, recall and F1 over the classes; an undefined value counts as 0.
        matrix: (label, [(rows, share of the label's rows)]) of each class.
    """

    rows: list[ClassRow]
    macro: tuple[float, ...]
    pairs: list[ConfusedPair]
    matrix: list[tuple[str, list[tuple[int, float]]]]

    @property
    def are_sets(self) -> bool:
        """Whether a row may have several classes."""
        return any(row.predicted is not None for row in self.rows)

    @property
    def shows_percentages(self) -> bool:
        """Whether the matrix has space for percentages."""
        return len(self.matrix) <= _MOST_WITH_PERCENTAGES


def classes(part: Record) -> Classes:
    """The classes of one split of analysis.json."""
    rows = [_class_row(row) for row in part.records("classes")]
    totals = {row.label: row.rows for row in rows}
    pairs = [_confused_pair(row, totals) for row in part.records("confused")[:_MOST_PAIRS]]
    shares = [(row.precision or 0.0, row.recall or 0.0, row.f1 or 0.0) for row in rows]
    macro = tuple(fmean(column) for column in zip(*shares, strict=True))
    rows.sort(key=lambda row: (row.f1 is None, row.f1 or 0.0, -row.rows))  # classes without an F1 come last
    return Classes(rows, macro, pairs, _matrix(part))


def _class_row(row: Record) -> ClassRow:
    shares = [row.number(name) for name in ("precision", "recall", "f1")]
    predicted = _count(row.number("predicted")) if "predicted" in row else None
    return ClassRow(row.text("label"), *shares, _count(row.number("rows")), predicted)


def _confused_pair(row: Record, totals: dict[str, int]) -> ConfusedPair:
    """A pair; `totals` has the number of rows of each label."""
    label, count = row.text("label"), _count(row.number("rows"))
    total = totals.get(label)
    return ConfusedPair(label, row.text("prediction"), count, count / total if total else None)


def _count(value: float | None) -> int:
    return int(value or 0)


def _matrix(part: Record) -> list[tuple[str, list[tuple[int, float]]]]:
    labels = part.texts("labels")
    counts = part.table("confusion", len(labels))
    if len(labels) != len(counts) or len(labels) > _MOST_CLASSES:
        return []
    return [
        (label, [(_count(count), count / max(1.0, sum(row))) for count in row])
        for label, row in zip(labels, counts, strict=True)
    ]


@dataclass(frozen=True)
class HardRow:
    """A row that the model got wrong; `loss` in nats or squared points."""

    row: float | None
    texts: list[str]
    label: str
    prediction: str
    probability: float | None
    loss: float | None


@dataclass(frozen=True)
class Explained:
    """One row, with (token, score, strength in 0..1) for each of its tokens."""

    row: float | None
    label: str
    prediction: str
    tokens: list[tuple[str, float, float]]


@dataclass(frozen=True)
class SplitAnalysis:
    """The content of analysis.json for one split."""

    name: str
    rows: float | None
    classes: Classes
    calibration: charts.Chart | None
    calibration_error: float | None
    scatter: charts.Chart | None
    hardest: list[HardRow]
    explained: list[Explained]


def split_analysis(name: str, part: Record) -> SplitAnalysis:
    """Reads one split of analysis.json."""
    calibration, points = part.part("calibration"), part.table("points", 2)
    bins = calibration.table("bins", 5)
    return SplitAnalysis(
        name,
        part.number("rows"),
        classes(part),
        charts.reliability(bins) if bins else None,
        calibration.number("ece"),
        charts.scatter(points) if points else None,
        [_hard_row(row) for row in part.records("hardest")],
        [_explained(row) for row in part.records("explained")],
    )


def _hard_row(row: Record) -> HardRow:
    texts = [shortened(text, _LONGEST_TEXT) for text in row.texts("texts")]
    return HardRow(
        row.number("row"),
        texts,
        row.text("label"),
        row.text("prediction"),
        row.number("probability"),
        row.number("loss"),
    )


def _explained(row: Record) -> Explained:
    values = row.numbers("scores")
    largest = max(map(abs, values), default=0.0) or 1.0
    tokens = [(token, value, abs(value) / largest) for token, value in zip(row.texts("tokens"), values, strict=False)]
    return Explained(row.number("row"), row.text("label"), row.text("prediction"), tokens)


def diagnostic(analysis: Record) -> list[tuple[str, float | None, int]]:
    """(category, Matthews correlation, rows) of the diagnostic set."""
    found = []
    part = analysis.part("diagnostic")
    for category, pair in part.values.items():
        value = rows = None
        if isinstance(pair, list) and len(pair) == 2:
            value, rows = pair
        entry = Record({"value": value, "rows": rows}, f"{part.name} {category}", part.ignored)
        found.append((category, entry.number("value"), int(entry.number("rows") or 0)))
    return found
