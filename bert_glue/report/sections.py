"""The parts of a run's page: its scores beside published ones, and what single rows show about its errors."""

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

_NOISE = 2.0 * 2**0.5  # standard errors of one score: a difference of two has the square root of two of them
_MOST_PAIRS = 10
# A matrix has percentages up to the first size and counts up to the second; above, it would not be legible.
_ROOMY_CLASSES, _MOST_CLASSES = 10, 50
_LONGEST_TEXT = 600


@dataclass(frozen=True)
class Score:
    """Headline value of one evaluated split, 0..1 (correlations -1..1).

    Args:
        others: (metric, value) of the other metrics.
        reason: why there is no value, or why it is to be mistrusted.
        constant: the beginning of the words for `majority`: "majority", or "constant" for several labels a row.
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
        """True if always answering the most frequent class is as good."""
        return None not in (self.value, self.majority) and self.value <= self.majority


def scores(task: GlueTask, results: Record, metrics: Sequence[str]) -> list[Score]:
    """The score of each split that the run evaluated.

    Args:
        metrics: names that are shown where the results have them.
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
        values, differences: of each split, in 0..1.
        verdicts: of each split; none where the figures cannot be compared.
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
        return [
            (v, verdict.style if verdict else "soft") for v, verdict in zip(self.values, self.verdicts, strict=False)
        ]

    @property
    def distinct_verdicts(self) -> list[Verdict]:
        """Each verdict once."""
        return [verdict for verdict in dict.fromkeys(self.verdicts) if verdict]


@dataclass(frozen=True)
class Comparison:
    """A run beside published ones.

    Args:
        counts: of each split, how many published figures have which verdict; empty where not comparable.
        other_rows: (rows evaluated, GLUE's) where they differ.
        picture: None where nothing can be drawn.
    """

    counts: list[tuple[Score, list[tuple[Verdict, int]]]]
    rows: list[ComparedRow]
    other_rows: tuple[int, int] | None
    picture: charts.Strip | None


def comparison(task: GlueTask, results: Record, found: list[Score]) -> Comparison | None:
    """The section; None where nothing was published, nothing was evaluated, or the data is the sample."""
    if not task.published or not found or results.flag("sample_data"):
        return None
    samples = [keys.evaluation_key(keys.SAMPLES, split.key_suffix) for split in task.evaluation]
    other = other_rows(task, {key: results.number(key) for key in samples})
    published = [
        _compared(run.where, run.epochs, [score / 100 for score in run.scores], run.samples_per_second, found, other)
        for run in task.published
    ]
    majority = [score.majority for score in found]
    rows = [_compared("", None, majority, None, found, None)] if any(v is not None for v in majority) else []
    return Comparison(
        [] if other else [_counted(at, score, published) for at, score in enumerate(found)],
        rows + published,
        other,
        None if other else _picture(found, published),
    )


def _compared(
    where: str,
    epochs: int | None,
    values: Sequence[float | None],
    speed: float | None,
    found: list[Score],
    other: tuple[int, int] | None,
) -> ComparedRow:
    pairs = list(zip(found, values, strict=False))
    return ComparedRow(
        where,
        epochs,
        tuple(values),
        () if other else tuple(_difference(score.value, value) for score, value in pairs),
        () if other else tuple(_verdict(score, value) for score, value in pairs),
        speed,
    )


def _difference(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or theirs is None else mine - theirs


def _verdict(score: Score, theirs: float | None) -> Verdict | None:
    difference = _difference(score.value, theirs)
    if difference is None or score.standard_error is None:
        return None
    if abs(difference) <= _NOISE * score.standard_error:
        return Verdict.NOISE
    return Verdict.HIGHER if difference > 0 else Verdict.LOWER


def _counted(at: int, score: Score, published: list[ComparedRow]) -> tuple[Score, list[tuple[Verdict, int]]]:
    counts = Counter(row.verdicts[at] for row in published if at < len(row.verdicts))
    return score, [(verdict, counts[verdict]) for verdict in Verdict if counts[verdict]]


def _picture(found: list[Score], published: list[ComparedRow]) -> charts.Strip | None:
    zones = [_zone(score) for score in found]
    # The most frequent class is often far away, and would squeeze the rest: its dot may lie at the end.
    others = [value for row in published for value in row.values if value is not None]
    return charts.strip(zones, others) if any(zones) else None


def _zone(score: Score) -> tuple[float, float, float] | None:
    if score.value is None or score.standard_error is None:
        return None
    reach = _NOISE * score.standard_error
    return score.value - reach, score.value, score.value + reach


# Single rows


@dataclass(frozen=True)
class ClassRow:
    """Shares of one class, 0..1; None where a share has no rows.

    Args:
        predicted: rows that were given the class; None where each row has one class.
    """

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    rows: int
    predicted: int | None = None


@dataclass(frozen=True)
class ConfusedPair:
    """Rows of `label` that were taken for `prediction`; `share` is of the label's rows, None where unknown."""

    label: str
    prediction: str
    rows: int
    share: float | None


@dataclass(frozen=True)
class Classes:
    """What a split says of single classes; any part may be empty.

    Args:
        rows: from the lowest F1.
        macro: mean precision, recall and F1 over the classes, an undefined one counting as 0.
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
    def is_roomy(self) -> bool:
        """Whether the matrix has space for percentages."""
        return len(self.matrix) <= _ROOMY_CLASSES


def classes(part: Record) -> Classes:
    """Classes of one split of analysis.json."""
    rows = [_class_row(row) for row in part.records("classes")]
    totals = {row.label: row.rows for row in rows}
    pairs = [
        ConfusedPair(label, row.text("prediction"), count, count / totals[label] if totals.get(label) else None)
        for row in part.records("confused")[:_MOST_PAIRS]
        for label, count in [(row.text("label"), _count(row.number("rows")))]
    ]
    shares = [(row.precision or 0.0, row.recall or 0.0, row.f1 or 0.0) for row in rows]
    macro = tuple(fmean(column) for column in zip(*shares, strict=True))
    rows.sort(key=lambda row: (row.f1 is None, row.f1, -row.rows))
    return Classes(rows, macro, pairs, _matrix(part))


def _class_row(row: Record) -> ClassRow:
    shares = [row.number(name) for name in ("precision", "recall", "f1")]
    predicted = _count(row.number("predicted")) if "predicted" in row else None
    return ClassRow(row.text("label"), *shares, _count(row.number("rows")), predicted)


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
    """One row with (token, score, strength in 0..1) of each of its tokens."""

    row: float | None
    label: str
    prediction: str
    tokens: list[tuple[str, float, float]]


@dataclass(frozen=True)
class SplitAnalysis:
    """What analysis.json says of one split."""

    name: str
    rows: float | None
    classes: Classes
    calibration: charts.Chart | None
    calibration_error: float | None
    scatter: charts.Chart | None
    hardest: list[HardRow]
    explained: list[Explained]


def split_analysis(name: str, part: Record) -> SplitAnalysis:
    """One split of analysis.json."""
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
        value, rows = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        entry = Record({"value": value, "rows": rows}, f"{part.name} {category}", part.ignored)
        found.append((category, entry.number("value"), int(entry.number("rows") or 0)))
    return found
