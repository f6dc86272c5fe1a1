"""The parts of a run's page: rows looked at one by one, and the run beside the published ones."""

from __future__ import annotations

import html
from typing import Any

from bert_glue.report import charts as report_charts
from bert_glue.report.page import section, table
from bert_glue.report.words import both
from bert_glue.results.model_card import other_rows
from bert_glue.tasks import GlueTask


def analysis_sections(analysis: dict[str, Any]) -> str:
    """HTML of `analysis.json`; "" where the run did not evaluate."""
    parts = []
    for name, part in analysis.get("splits", {}).items():
        charts = [_confusion(part), _calibration_chart(part), _scatter(part)]
        parts.append(
            section(
                "analysis",
                f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "",
                _hardest(part),
                _explained(part),
                split=name,
                rows=part["rows"],
            )
        )
    return "".join(parts) + _diagnostic(analysis.get("diagnostic"))


def _confusion(part: dict) -> str:
    if part.get("confused"):
        rows = [[html.escape(label), html.escape(answer), str(count)] for label, answer, count in part["confused"]]
        return f"<div>{table([both(key) for key in ('label', 'prediction', 'rows')], rows, numbers=(2,))}</div>"
    if "confusion" not in part:
        return ""
    labels = [html.escape(label) for label in part["labels"]]
    rows = []
    for label, counts in zip(labels, part["confusion"], strict=True):
        total = max(1, sum(counts))
        shares = []
        for count in counts:
            tint = f"color-mix(in srgb, var(--a) {round(60 * count / total)}%, transparent)"
            shares.append(f'<div style="background:{tint}">{count}<br><small>{100 * count / total:.1f} %</small></div>')
        rows.append([f"<b>{label}</b>", *shares])
    how = f'<p class="note">{both("confusion_how")}</p>'
    return f"<div>{table([both('confusion'), *labels], rows, 'heat')}{how}</div>"


def _calibration_chart(part: dict) -> str:
    found = part.get("calibration")
    if not found or not found["bins"]:
        return ""
    note = f'<p class="note">{both("ece", ece=format(found["ece"], ".3f"))}</p>'
    return f"<div>{report_charts.reliability(found['bins'])}{note}</div>"


def _scatter(part: dict) -> str:
    return f"<div>{report_charts.points(part['points'], 'scatter', 'label')}</div>" if part.get("points") else ""


def _hardest(part: dict) -> str:
    rows = [
        [
            str(error["row"]),
            "<br>".join(html.escape(text) for text in error["texts"]),
            html.escape(error["label"]),
            html.escape(error["prediction"]),
            "-" if error["probability"] is None else f"{error['probability']:.3f}",
            f"{error['loss']:.2f}",
        ]
        for error in part["hardest"]
    ]
    if not rows:
        return ""
    keys = ("row", "texts", "label", "prediction", "probability", "loss")
    cells = table([both(key) for key in keys], rows, "texts", numbers=(0, 4, 5))
    return f"<details><summary>{both('hardest')} ({len(rows)})</summary>{cells}</details>"


def _explained(part: dict) -> str:
    """Examples with their tokens shaded by attribution, each scaled to its own largest."""
    found = part.get("explained")
    if not found:
        return ""
    parts = [f'<p class="note">{both("explained_how")}</p>']
    for example in found:
        largest = max((abs(score) for score in example["scores"]), default=0.0) or 1.0
        tokens = []
        for token, score in zip(example["tokens"], example["scores"], strict=True):
            colour = "var(--a)" if score >= 0 else "var(--b)"
            share = round(55 * abs(score) / largest)
            tint = f"color-mix(in srgb, {colour} {share}%, transparent)"
            tokens.append(f'<span style="background:{tint}" title="{score:+.4f}">{html.escape(token)}</span>')
        label, prediction = html.escape(example["label"]), html.escape(example["prediction"])
        parts.append(
            f'<p class="tokens"><small>{both("row")} {example["row"]}, {both("label")} {label}, '
            f"{both('prediction')} {prediction}</small><br>{' '.join(tokens)}</p>"
        )
    return f"<details><summary>{both('explained')} ({len(found)})</summary>{''.join(parts)}</details>"


def _diagnostic(found: dict | None) -> str:
    if not found:
        return ""
    rows = [
        [html.escape(name), "-" if value is None else f"{100 * value:.2f}", str(rows)]
        for name, (value, rows) in found.items()
    ]
    return section("diagnostic", table([both("category"), "R3 x100", both("rows")], rows, numbers=(1, 2)))


_NOISE = 2.0 * 2**0.5  # standard errors
_STYLES = {"noise": "soft", "higher": "good", "lower": "bad"}
Values = list[float | None]  # one for each evaluated split


def splits_of(results: dict, analysis: dict) -> list[tuple[str, dict, float | None]]:
    """(suffix of keys, analysis, headline value) of each evaluated split."""
    found = analysis.get("splits", {})
    return [
        (part["suffix"], part, results.get(f"eval_{results['headline_metric']}{part['suffix']}"))
        for part in found.values()
    ]


def points(value: float | None, digits: int = 2) -> str:
    """A share as points, x100; "-" for none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def comparison(task: GlueTask, results: dict, analysis: dict) -> str:
    """The section: in a sentence, as a table with a picture of each row, and by which rule."""
    splits = splits_of(results, analysis)
    errors: Values = [part["standard_error"] for _, part, _ in splits]
    own: Values = [value for *_, value in splits]
    majority: Values = [part["majority"] for _, part, _ in splits]
    published: list[Values] = [[score / 100 for score in run.scores] for run in task.published]
    why_not = _not_comparable(task, results)
    is_drawn = not why_not and any(None not in pair for pair in zip(own, errors, strict=True))
    drawn = report_charts.Strip(own, [e and _NOISE * e for e in errors], published) if is_drawn and published else None

    def row(name: str, values: Values, is_judged: bool, speed: str) -> list[str | None]:
        verdicts = [_verdict(*three) for three in zip(own, values, errors, strict=False)]
        judged = [_differences(own, values), _shown(verdicts)] if is_judged else ["-", both("not_comparable")]
        picture = drawn.draw(values, [_STYLES[verdict or "noise"] for verdict in verdicts]) if drawn else ""
        return [name + picture, _pair(values), "-", *judged, speed]

    speed, device = _rate(results.get("train_samples_per_second")), html.escape(results["device_name"])
    label = both("this_run") + (f" ({both('sample')})" if results["sample_data"] else "")
    here = f"{label}, {device}" + (drawn.draw([], []) if drawn else "")
    rows: list[list[str | None]] = [[None, here, _pair(own), _pair(errors), "-", "-", speed]]
    if any(value is not None for value in majority):
        rows.append(row(both("majority"), majority, True, "-"))
    for run, scores in zip(task.published, published, strict=True):
        name = both("published", where=run.where, epochs=run.epochs)
        rows.append(row(name, scores, not why_not, _rate(run.samples_per_second)))
    header = ("run", "value", "error", "difference", "verdict", "speed")
    words = [both(key, metric=results["headline_metric"]) for key in header]
    notes = f'<p class="note">{both("noise_rule")} {both("place_how") if drawn else ""}</p>' if published else ""
    sentence = why_not or "".join(_sentence(*part, own, errors, published) for part in enumerate(splits))
    return section("compare", sentence if published else "", table(words, rows, "compare", (1, 2, 3, 5)), notes)


def _not_comparable(task: GlueTask, results: dict) -> str:
    """Why published figures say nothing about this run, as HTML; "" where they do."""
    if results["sample_data"]:
        return f'<p class="verdict">{both("sample_compared")}</p>'
    if other := other_rows(task, results):
        return f'<p class="verdict">{both("other_rows", rows=other[0], official=other[1])}</p>'
    return ""


def _sentence(at: int, part: tuple, own: Values, errors: Values, published: list[Values]) -> str:
    """How many published figures of split number `at` lie where, for who reads nothing else."""
    verdicts = [_verdict(own[at], scores[at], errors[at]) for scores in published if at < len(scores)]
    if not verdicts or None in verdicts:
        return ""
    counts = {key: verdicts.count(key) for key in _STYLES}
    told = [f'<span class="{_STYLES[key]}">{both(f"{key}_than", n=n)}</span>' for key, n in counts.items() if n]
    score = both("score_is", value=points(own[at]), se=points(errors[at]), split=part[0].replace("_", " "))
    return f'<p class="verdict">{score} {"; ".join(told)}</p>'


def _verdict(mine: float | None, theirs: float | None, error: float | None) -> str | None:
    """noise, higher or lower: what this run is beside another figure; None where that cannot be said."""
    if mine is None or theirs is None or error is None:
        return None
    return "noise" if abs(mine - theirs) <= _NOISE * error else "higher" if mine > theirs else "lower"


def _shown(verdicts: list[str | None]) -> str:
    found = [f'<span class="{_STYLES[v]}">{both(v)}</span>' for v in dict.fromkeys(verdicts) if v]
    return " / ".join(found) or "-"


def _differences(own: Values, other: Values) -> str:
    pairs = zip(own, other, strict=False)
    return " / ".join("-" if a is None or b is None else f"{100 * (a - b):+.2f}" for a, b in pairs) or "-"


def _pair(values: Values) -> str:
    return " / ".join(points(value) for value in values) or "-"


def _rate(speed: float | None) -> str:
    return f"{speed:,.1f}" if speed else "-"
