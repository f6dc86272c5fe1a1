"""The part of a report that looks at single rows: confusions, calibration, errors, categories, tokens."""

from __future__ import annotations

import html
from typing import Any

from bert_glue import svg
from bert_glue.report_page import section, table
from bert_glue.report_words import both


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
    return f"<div>{svg.reliability(found['bins'])}{note}</div>"


def _scatter(part: dict) -> str:
    return f"<div>{svg.points(part['points'], 'scatter', 'label')}</div>" if part.get("points") else ""


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
