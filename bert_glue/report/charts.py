"""Small charts as inline SVG that take their colours from the page, so that they fit light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bert_glue.report.words import both

WIDTH, HEIGHT = 360, 210  # user units; the page scales them
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 28, 34
_MOST_POINTS = 500


@dataclass(frozen=True)
class Line:
    """One series of a chart.

    Args:
        points: (x, y), y finite.
        style: CSS class: a, b or rule.
        name: key of its word in the legend; "" for none.
    """

    points: Sequence[tuple[float, float]]
    style: str = "a"
    name: str = ""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short text of a tick."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


class _Frame:
    """Axes of a chart: maps values to positions and draws grid, ticks and title."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], title: str, under: str = "steps"):
        self.x, self.y, self.title, self.under = _spread(x, 0.0), _spread(y, 0.06), title, under

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Position of a point, user units."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1),
        )

    def draw(self, inside: str) -> str:
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart">']
        parts.append(_text(12, 16, self.title, "title"))
        for value in ticks(*self.y):
            height = self.at(self.x[0], value)[1]
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height}" y2="{height}"/>')
            parts.append(f'<text class="tick end" x="{_LEFT - 5}" y="{height + 3.5}">{number(value)}</text>')
        for value in ticks(*self.x):
            across = self.at(value, self.y[0])[0]
            parts.append(f'<text class="tick mid" x="{across}" y="{HEIGHT - _BOTTOM + 14}">{number(value)}</text>')
        parts.append(_text(WIDTH / 2, HEIGHT - 5, self.under, "tick mid"))
        return "".join([*parts, inside, "</svg>"])


def _text(x: float, y: float, key: str, style: str) -> str:
    """A word of both languages at a place."""
    return (
        both(key, "text")
        .replace('class="', f'x="{x:g}" y="{y:g}" class="{style} ')
        .replace("<text>", f'<text x="{x:g}" y="{y:g}" class="{style}">')
    )


def _spread(limits: tuple[float, float], share: float) -> tuple[float, float]:
    """Limits with some room, and never empty."""
    low, high = limits
    margin = (high - low) * share or (abs(high) * 0.1 or 1.0) * (low == high)
    return low - margin, high + margin


def lines(series: Sequence[Line], title: str) -> str:
    """Series against steps; "" if none has a point."""
    series = [line for line in series if line.points]
    points = [point for line in series for point in line.points]
    if not points:
        return ""
    frame = _Frame(_limits(p[0] for p in points), _limits(p[1] for p in points), title)
    drawn, legend = [], []
    for line in series:
        every = -(-len(line.points) // _MOST_POINTS)
        kept = [*line.points[::every], line.points[-1]]
        places = [frame.at(*point) for point in kept]
        path = " ".join(f"{x},{y}" for x, y in places)
        drawn.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if len(line.points) <= 12 and line.style != "rule":
            drawn += [f'<circle class="dot {line.style}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in places[:-1]]
        if line.name:
            legend.append((line.style, line.name))
    for at, (style, name) in enumerate(legend if len(legend) > 1 else ()):
        x, y = WIDTH - _RIGHT - 226 + 106 * at, 12  # beside the title, where no line passes
        drawn.append(f'<line class="line {style}" x1="{x}" x2="{x + 16}" y1="{y}" y2="{y}"/>')
        drawn.append(_text(x + 20, y + 3.5, name, "tick"))
    return frame.draw("".join(drawn))


def _limits(values) -> tuple[float, float]:
    values = list(values)
    return min(values), max(values)


def points(pairs: Sequence[Sequence[float]], title: str, under: str) -> str:
    """A point a row, and the diagonal on which both are equal."""
    low, high = _limits(value for pair in pairs for value in pair)
    frame = _Frame((low, high), (low, high), title, under)
    (x1, y1), (x2, y2) = frame.at(low, low), frame.at(high, high)
    dots = "".join(f'<circle class="dot a soft" cx="{x}" cy="{y}" r="2.5"/>' for x, y in (frame.at(*p) for p in pairs))
    return frame.draw(f'<line class="line rule" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>' + dots)


def reliability(bins: Sequence[Sequence[float]]) -> str:
    """Share right against confidence, a bar a bin, and the diagonal of perfect calibration."""
    frame = _Frame((0.0, 1.0), (0.0, 1.0), "calibration", "confidence")
    bars = []
    for low, high, rows, confidence, right in bins:
        (x1, top), (x2, bottom) = frame.at(low, right), frame.at(high, 0.0)
        tip = f"{rows}: {confidence:.3f} / {right:.3f}"
        bars.append(
            f'<rect class="bar" x="{x1 + 1}" y="{top}" width="{x2 - x1 - 2:.1f}" height="{bottom - top:.1f}">'
            f"<title>{tip}</title></rect>"
        )
    (x1, y1), (x2, y2) = frame.at(0, 0), frame.at(1, 1)
    return frame.draw("".join(bars) + f'<line class="line rule" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated linearly."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(0.25), at(0.5), at(0.75)


def boxes(rows: Sequence[tuple[str, Sequence[tuple[float, bool]], float | None, Sequence[float]]]) -> str:
    """Horizontal box plots on one scale, one a row.

    Args:
        rows: (name, (value, whether it collapsed) of each seed, majority baseline or None, published figures). A
            baseline far below the rest would squeeze it: it then is a number at the left.
    """
    left, step = (96 if any(name for name, *_ in rows) else 14), 34
    height = step * len(rows) + 34
    low, high = _spread(_limits(v for _, seeds, _, others in rows for v in (*(s for s, _ in seeds), *others)), 0.08)
    near = [m for *_, m, _ in rows if m is not None and m > low - (high - low)]
    low = min([low, *(m - 0.05 * (high - low) for m in near)])

    def across(value: float) -> float:
        return round(left + (value - low) / (high - low) * (WIDTH - left - 14), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" class="chart wide">']
    for value in ticks(low, high, 5):
        x = across(value)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="6" y2="{height - 26}"/>')
        parts.append(f'<text class="tick mid" x="{x}" y="{height - 12}">{number(value)}</text>')
    for at, (name, seeds, majority, others) in enumerate(rows):
        y = 24 + step * at
        parts.append(f'<text class="tick end" x="{left - 8}" y="{y + 3.5}">{html.escape(name)}</text>')
        parts.append(_box(seeds, y, across))
        parts += [f'<path class="other" d="M{across(v)} {y - 13}v7"><title>{v:.2f}</title></path>' for v in others]
        if majority is not None and majority < low:
            parts.append(f'<text class="tick" x="{left}" y="{y + 3.5}">\u25c2 {majority:.1f}</text>')
        elif majority is not None:
            x = across(majority)
            parts.append(f'<line class="line rule" x1="{x}" x2="{x}" y1="{y - 12}" y2="{y + 12}"/>')
    return "".join([*parts, "</svg>"])


def _box(seeds: Sequence[tuple[float, bool]], y: float, across: Callable[[float], float]) -> str:
    values = [value for value, _ in seeds]
    first, middle, third = (across(q) for q in quartiles(values))
    parts = [f'<line class="whisker" x1="{across(min(values))}" x2="{across(max(values))}" y1="{y}" y2="{y}"/>']
    width = max(third - first, 0.5)
    parts.append(f'<rect class="box" x="{first}" y="{y - 8}" width="{width:.1f}" height="16"/>')
    parts.append(f'<line class="median" x1="{middle}" x2="{middle}" y1="{y - 8}" y2="{y + 8}"/>')
    for value, has_collapsed in seeds:
        style = "ring" if has_collapsed else "dot a soft"
        parts.append(
            f'<circle class="{style}" cx="{across(value)}" cy="{y}" r="3.2"><title>{value:.2f}</title></circle>'
        )
    return "".join(parts)


class Strip:
    """A narrow picture for each row of a table, all on one scale: a run's score, what is noise beside it, a figure.

    Args:
        own: the run's score of each split, None where it has none.
        reach: how far noise reaches from it on both sides.
        others: the figures that the scale has to hold; one that lies outside is drawn at the end.
    """

    def __init__(self, own: Sequence[float | None], reach: Sequence[float | None], others: Sequence[Sequence[float]]):
        self.zones = [None if v is None or r is None else (v - r, v, v + r) for v, r in zip(own, reach, strict=True)]
        values = [v for zone in self.zones if zone for v in zone] + [v for row in others for v in row]
        self.low, self.high = _spread(_limits(values), 0.04)

    def _at(self, value: float) -> float:
        return round(4 + 152 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 1)

    def draw(self, values: Sequence[float | None], styles: Sequence[str]) -> str:
        """One row: the splits below each other, each value as a dot of its class in the page's styles."""
        parts, each = ['<svg viewBox="0 0 160 18" role="img" class="strip">'], 18 / max(1, len(self.zones))
        for at, zone in enumerate(self.zones):
            if zone is None:
                continue
            top, (left, middle, right) = each * at, map(self._at, zone)
            parts.append(
                f'<rect class="noise" x="{left}" y="{top + 1:g}" width="{right - left:.1f}" height="{each - 2:g}"/>'
                f'<line class="self" x1="{middle}" x2="{middle}" y1="{top:g}" y2="{top + each:g}"/>'
            )
            if at < len(values) and values[at] is not None:
                parts.append(
                    f'<circle class="{styles[at]}" cx="{self._at(values[at])}" cy="{top + each / 2:g}" r="3.6"/>'
                )
        return "".join([*parts, "</svg>"])
