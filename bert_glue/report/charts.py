"""Charts of the reports and of curves.png: one description of what is drawn, as inline SVG or as PNG.

Positions are computed here. `templates/charts.svg` has the SVG elements. Their colours come from the page's style, so
they suit light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from bert_glue.errors import printable
from bert_glue.report.words import WORDS
from bert_glue.result_keys import LOSS, evaluation_key
from bert_glue.results.records import Record

Point = tuple[float, float]

# Colours by role, shared by the style of the pages and curves.png.
COLOURS = {
    "light": {
        "paper": "#ffffff", "ink": "#1c2126", "soft": "#56606a", "line": "#dfe3e8", "card": "#f6f7f9",
        "train": "#1f6feb", "eval": "#b34d12", "good": "#1a7f37", "bad": "#c21f2c", "warn": "#8a5c00",
    },
    "dark": {
        "paper": "#14181d", "ink": "#e4e8ec", "soft": "#a3adb8", "line": "#2e363f", "card": "#1c2229",
        "train": "#6cb0ff", "eval": "#f0a35e", "good": "#56d364", "bad": "#ff7b72", "warn": "#e3b341",
    },
}  # fmt: skip
WIDTH, HEIGHT = 360, 210  # user units; the page scales them
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 34, 36
_LATIN, _CHINESE = 5.4, 10.5  # width of a letter in the legend, user units
_MOST_POINTS = 400
_FEWEST_SMOOTHED = 20
_LEAST_POINTS = 4.0  # smallest span of an axis of scores
_LARGEST = 1e300  # the difference of two such numbers is finite


@dataclass(frozen=True)
class Axis:
    """Limits of an axis. Both have ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Position of a value, from 0 at the low end to 1 at the high end. Values beyond an end are moved to it."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


@dataclass(frozen=True)
class Line:
    """One series.

    Args:
        points: at least two (x, y).
        role: CSS class and colour: train, eval, raw or rule.
        word: key of its name in the legend; "" for none.
    """

    points: Sequence[Point]
    role: str = "train"
    word: str = ""


@dataclass(frozen=True)
class Chart:
    """Axes and the marks on them.

    Args:
        word: key of the title.
        below: key of the name of the horizontal axis.
        dots: points without a line.
        bars: (left, right, height, text).
    """

    word: str
    below: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...] = ()
    dots: tuple[Point, ...] = ()
    bars: tuple[tuple[float, float, float, str], ...] = ()
    width = WIDTH
    height = HEIGHT
    left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM

    def across(self, x: float) -> float:
        """Horizontal position, user units."""
        return round(_LEFT + self.x.share(x) * (WIDTH - _LEFT - _RIGHT), 1)

    def up(self, y: float) -> float:
        """Vertical position, user units from the top."""
        return round(HEIGHT - _BOTTOM - self.y.share(y) * (HEIGHT - _TOP - _BOTTOM), 1)

    @property
    def named(self) -> list[Line]:
        """Lines of the legend, if there is more than one kind of line."""
        named = [line for line in self.lines if line.word]
        return named if len(named) > 1 else []

    @property
    def legend(self) -> list[tuple[Line, float]]:
        """(line, left end of its entry) of the legend, which is aligned to the right."""
        x, entries = float(self.right), []
        for line in reversed(self.named):
            x -= 34 + max(_LATIN * len(WORDS[line.word][0]), _CHINESE * len(WORDS[line.word][1]))
            entries.append((line, round(x, 1)))
        return entries[::-1]


def axis(values: Iterable[float], count: int = 4, low: float | None = None, least_span: float = 0.0) -> Axis:
    """Round limits around values, about `count` steps apart.

    Args:
        low: start of the axis, unless a value is lower.
        least_span: smallest span of the axis. Values with a smaller span are centred.
    """
    found = [min(_LARGEST, max(-_LARGEST, value)) for value in values]
    least, most = min(found), max(found)
    if low is not None:
        least = min(low, least)
    if most - least < least_span:
        least, most = (least + most - least_span) / 2, (least + most + least_span) / 2
    if most - least <= max(1e-300, 1e-9 * max(abs(least), abs(most))):
        most = least + (abs(least) or 1.0)
    step = _round_step((most - least) / count)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return Axis(first * step, last * step, tuple(n * step for n in range(first, last + 1)))


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def number(value: float) -> str:
    """A tick as a short text."""
    if abs(value) >= 1e5 or 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean over a window of a twentieth of the points. The window is symmetric, so the curve does not lag."""
    sums = [0.0, *accumulate(y for _, y in points)]
    widest = max(1, len(points) // 40)
    found = []
    for at, (x, _) in enumerate(points):
        half = min(widest, at, len(points) - 1 - at)
        found.append((x, (sums[at + half + 1] - sums[at - half]) / (2 * half + 1)))
    return found


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most a few hundred points that keep the highs and lows."""
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    if size < 2:
        return list(points)
    kept = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def curves(history: Sequence[Record], headline: str, majority: float | None, constant: str = "majority") -> list[Chart]:
    """Charts of a training run. A series with a single point is left out.

    Args:
        history: the log entries of trainer_state.json.
        headline: name of the metric.
        majority: the metric of the best constant answer, 0..1; None if unknown.
        constant: the kind of that answer, see `sections.Score`.
    """

    def series(key: str, factor: float = 1.0) -> list[Point]:
        pairs = [(entry.number("step"), entry.number(key)) for entry in history if key in entry]
        found = [(step, factor * value) for step, value in pairs if value is not None and (step or -1) > 0]
        return found if len(found) > 1 else []

    rates, scales = series("learning_rate"), series("loss_scale")
    lines = {
        "loss": _loss_lines(series("loss"), series(evaluation_key(LOSS))),
        "score_chart": _score_lines(series(evaluation_key(headline), 100.0), majority, f"{constant}_line"),
        "learning_rate": [Line(thinned(rates))] if rates else [],
        # A loss scale that never changes is not worth a chart.
        "loss_scale": [Line(thinned(scales))] if len({value for _, value in scales}) > 1 else [],
    }
    last = max((step for found in lines.values() for line in found for step, _ in line.points), default=0)
    return [_curve(word, found, _step_axis(last)) for word, found in lines.items() if found]


def _step_axis(last: float) -> Axis:
    """Steps from 0 to the last one, with round ticks in between."""
    round_axis = axis((0, last))
    return Axis(0.0, last, tuple(tick for tick in round_axis.ticks if tick <= last))


def _curve(word: str, lines: list[Line], steps: Axis) -> Chart:
    values = [y for line in lines for _, y in line.points]
    # Axes of losses and rates start at zero. An axis of scores includes the majority class and has round limits.
    limits = axis(values, least_span=_LEAST_POINTS) if word == "score_chart" else axis(values, low=0.0)
    return Chart(word, "steps", steps, limits, tuple(lines))


def _loss_lines(loss: list[Point], evaluated: list[Point]) -> list[Line]:
    found = []
    if len(loss) >= _FEWEST_SMOOTHED:
        found = [Line(thinned(loss), "raw", "raw_line"), Line(thinned(smoothed(loss)), "train", "smooth_line")]
    elif loss:
        found = [Line(loss, "train", "train_line")]
    return found + ([Line(thinned(evaluated), "eval", "eval_line")] if evaluated else [])


def _score_lines(score: list[Point], majority: float | None, word: str) -> list[Line]:
    if not score:
        return []
    found = [Line(thinned(score), "eval", "eval_line")]
    if majority is not None:
        found.append(Line([(0.0, 100 * majority), (score[-1][0], 100 * majority)], "rule", word))
    return found


def scatter(pairs: Sequence[Sequence[float]]) -> Chart:
    """One point per row, (label, prediction), and the diagonal on which both are equal."""
    both_axes = axis(value for pair in pairs for value in pair)
    ends = (both_axes.low, both_axes.low), (both_axes.high, both_axes.high)
    points = tuple((float(x), float(y)) for x, y in pairs)
    return Chart("scatter", "label_axis", both_axes, both_axes, (Line(ends, "rule"),), points)


def reliability(bins: Sequence[Sequence[float]]) -> Chart:
    """Share of correct predictions by confidence, one bar per bin, and the diagonal of perfect calibration.

    Args:
        bins: [low, high, rows, mean confidence, accuracy].
    """
    whole = axis((0.0, 1.0))
    bars = tuple((low, high, right, f"{rows:.0f}: {mean:.3f} / {right:.3f}") for low, high, rows, mean, right in bins)
    return Chart("calibration", "confidence", whole, whole, (Line([(0, 0), (1, 1)], "rule"),), bars=bars)


@dataclass(frozen=True)
class SeedRow:
    """One row of a chart of seeds, points x100.

    Args:
        label: text of the row.
        seeds: (value, whether it collapsed).
        mean, interval: None if there are too few seeds.
    """

    label: str
    seeds: tuple[tuple[float, bool], ...]
    mean: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class SeedChart:
    """Seeds of the settings of one task on one scale.

    Args:
        majority: points of the most frequent class. It is left out if it is far below everything else, where it would
            compress the rest.
    """

    rows: tuple[SeedRow, ...]
    published: tuple[float, ...]
    majority: float | None
    x: Axis
    width = WIDTH
    left = 16
    step = 42

    @property
    def height(self) -> int:
        """User units."""
        return self.step * len(self.rows) + 40

    def across(self, value: float) -> float:
        """Horizontal position, user units."""
        return round(self.left + self.x.share(value) * (self.width - 2 * self.left), 1)


def seed_chart(rows: Sequence[SeedRow], published: Sequence[float], majority: float | None) -> SeedChart:
    """The chart of one task's settings; at least one row has a seed."""
    values = [value for row in rows for value, _ in row.seeds] + list(published)
    values += [end for row in rows if row.interval for end in row.interval if -100.0 <= end <= 100.0]
    low, high = min(values), max(values)
    is_near = majority is not None and majority > low - max(1.0, high - low)
    return SeedChart(
        tuple(rows),
        tuple(published),
        majority if is_near else None,
        axis([*values, *([majority] if is_near else [])], 5, least_span=_LEAST_POINTS),
    )


@dataclass(frozen=True)
class Strip:
    """The narrow picture in a row of the comparison: this run's score, its margin of error, and the figure of the row.

    Args:
        zones: (low, score, high) of each split; None if a split has no score.
    """

    zones: tuple[tuple[float, float, float] | None, ...]
    x: Axis
    width = 160
    height = 18

    def across(self, value: float) -> float:
        """Horizontal position, user units."""
        return round(4 + 152 * self.x.share(value), 1)


def strip(zones: Sequence[tuple[float, float, float] | None], others: Iterable[float]) -> Strip:
    """The scale for the pictures of all rows. It covers the zones and the figures of the rows."""
    values = [value for zone in zones if zone for value in zone] + list(others)
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 1.0
    return Strip(tuple(zones), Axis(low - margin, high + margin, ()))


_WIDTHS = {"raw": 1.0, "rule": 1.2}


def write_png(path: Path, charts: Sequence[Chart], title: str) -> None:
    """The charts of a training run side by side as a picture, in the pages' light colours.

    Raises:
        OSError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    colours = COLOURS["light"]
    if not charts:
        title += ": too few steps were logged for a curve"
    lines = {
        "train": colours["train"],
        "eval": colours["eval"],
        "raw": colours["train"] + "59",
        "rule": colours["soft"],
    }
    columns = len(charts) if 0 < len(charts) < 4 else max(1, len(charts) // 2)
    rows = math.ceil(len(charts) / columns)
    figure = Figure(figsize=(4.4 * columns, 0.5 + 2.7 * rows), layout="constrained", facecolor=colours["paper"])
    for at, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, at + 1, facecolor=colours["card"])
        for line in chart.lines:
            x, y = zip(*line.points, strict=True)
            dashes = "--" if line.role == "rule" else "-"
            name = WORDS[line.word][0] if line.word else None
            axes.plot(x, y, dashes, color=lines[line.role], lw=_WIDTHS.get(line.role, 1.8), label=name, clip_on=False)
        axes.set(xlim=(chart.x.low, chart.x.high), ylim=(chart.y.low, chart.y.high))
        axes.set_xticks(chart.x.ticks, map(number, chart.x.ticks))
        axes.set_yticks(chart.y.ticks, map(number, chart.y.ticks))
        axes.set_title(WORDS[chart.word][0], loc="left", fontsize=10, fontweight="bold", color=colours["ink"])
        axes.set_xlabel(WORDS[chart.below][0], fontsize=8, color=colours["soft"])
        axes.grid(color=colours["line"])
        axes.tick_params(length=0, labelsize=8, labelcolor=colours["soft"])
        axes.spines[:].set_visible(False)
        if chart.named:
            axes.legend(fontsize=8, frameon=False, labelcolor=colours["ink"])
    # Names of files may hold bytes that no font has, and dollar signs, which are no formulas here.
    figure.suptitle(printable(title), parse_math=False, fontsize=10, color=colours["ink"])
    figure.savefig(path, dpi=130, format="png")
