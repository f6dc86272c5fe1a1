"""The frame of a report: one HTML file without script or network, in two languages, light and dark."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from bert_glue.report.words import both, starts_chinese

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2126; --soft: #5c6670; --line: #dfe3e8; --card: #f6f7f9;
  --a: #1f6feb; --b: #c2571a; --good: #1a7f37; --bad: #cf222e; --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e4e8ec; --soft: #9aa5b1; --line: #2e363f;
  --card: #1c2229; --a: #6cb0ff; --b: #f0a35e; --good: #56d364; --bad: #ff7b72; --warn: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .4rem 0; } small, .soft { color: var(--soft); } .note { font-size: .875rem; color: var(--soft); }
.switch { position: absolute; opacity: 0; } .languages { text-align: right; font-size: .875rem; padding: .6rem 1rem 0;
  max-width: 66rem; margin: 0 auto; }
.languages label { cursor: pointer; padding: .35rem .6rem; border: 1px solid var(--line); color: var(--soft); }
.languages label:first-child { border-radius: 6px 0 0 6px; border-right: 0; }
.languages label:last-child { border-radius: 0 6px 6px 0; }
#lang-en:checked ~ .languages label[for=lang-en], #lang-zh:checked ~ .languages label[for=lang-zh] {
  background: var(--ink); color: var(--paper); border-color: var(--ink); }
.switch:focus-visible ~ .languages { outline: 2px solid var(--a); }
#lang-en:checked ~ * .zh, #lang-zh:checked ~ * .en { display: none; }
.facts { display: flex; flex-wrap: wrap; gap: .35rem 1.2rem; padding: 0; margin: 0; list-style: none;
  font-size: .9rem; }
.facts b { font-weight: 600; } .facts li { overflow-wrap: anywhere; }
.badge { display: inline-block; border: 1px solid var(--warn); color: var(--warn); border-radius: 6px; padding: 0 .5rem;
  font-size: .875rem; font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.card .figure { font-size: 1.55rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card div { font-size: .85rem; color: var(--soft); } .card .figure { color: var(--ink); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .45rem .7rem; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child > * { border-top: 0; } th { color: var(--soft); font-weight: 600; background: var(--card); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { white-space: normal; } .compare td:first-child { min-width: 13rem; }
td:not(.number) { min-width: 7.5rem; } td code { display: inline-block; min-width: 10rem; }
th .en { display: inline-block; } th .en::first-letter { text-transform: uppercase; }
tr.own td { font-weight: 600; background: var(--card); }
.verdict { font-weight: 600; font-size: 1.05rem; margin-bottom: .6rem; } .strip { width: 11rem; height: 1.25rem;
  margin-top: .2rem;
  display: block; } .strip .noise { fill: var(--soft); fill-opacity: .22; } .strip .self { stroke: var(--ink);
  stroke-width: 1.6; } .strip .soft { fill: var(--soft); } .strip .good { fill: var(--good); }
.strip .bad { fill: var(--bad); } .strip text { font-size: 11px; } .other { fill: none; stroke: var(--b);
  stroke-width: 1.6; }
.texts td:nth-child(2) { min-width: 15rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: .8rem; }
.chart { width: 100%; height: auto; display: block; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; } .chart text { fill: var(--ink); font-size: 12px; font-family: inherit; }
.chart .title { font-weight: 600; } .chart .tick { fill: var(--soft); font-size: 10.5px; }
.chart .end { text-anchor: end; } .chart .mid { text-anchor: middle; } .grid { stroke: var(--line); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .line.a { stroke: var(--a); }
.line.b { stroke: var(--b); } .line.rule { stroke: var(--soft); stroke-dasharray: 4 3; stroke-width: 1.2; }
.dot.a { fill: var(--a); } .dot.b { fill: var(--b); } .dot.soft { fill-opacity: .55; } .bar { fill: var(--a);
  fill-opacity: .7; } .box { fill: var(--a); fill-opacity: .22; stroke: var(--a); } .whisker { stroke: var(--a); }
.median { stroke: var(--a); stroke-width: 2.2; } .ring { fill: none; stroke: var(--bad); stroke-width: 1.6; }
.good { color: var(--good); } .bad { color: var(--bad); } .heat th, .heat td { text-align: center;
  min-width: 4.5rem; } .heat td { padding: 0; } .heat td > * { display: block; padding: .45rem .7rem; }
.tokens { line-height: 2; overflow-wrap: anywhere; } .tokens span { border-radius: 4px; padding: .1rem .25rem; }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
@media (min-width: 60rem) { .compare td:first-child { min-width: 26rem; } }
@media (max-width: 34rem) { h1 { font-size: 1.3rem; } th, td { padding: .4rem .5rem; } .cards { gap: .5rem;
  grid-template-columns: 1fr 1fr; } .card { padding: .55rem .7rem; } .card .figure { font-size: 1.3rem; } }
@media print { .languages { display: none; } }
"""


def page(title: str, body: str) -> str:
    """A whole document; opens in Chinese where this process's locale is Chinese."""
    english, chinese = ("", " checked") if starts_chinese() else (" checked", "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>"
        f'<input type="radio" class="switch" name="language" id="lang-en"{english}>'
        f'<input type="radio" class="switch" name="language" id="lang-zh"{chinese}>'
        '<div class="languages"><label for="lang-en" lang="en">English</label>'
        '<label for="lang-zh" lang="zh-CN">中文</label></div>\n'
        f"<main>{body}</main></body></html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], style: str = "", numbers: Iterable[int] = ()) -> str:
    """A table of cells that are HTML already; it scrolls by itself where it is too wide.

    Args:
        style: CSS class of the table.
        numbers: columns that are aligned to the right. A row that starts with None is this run's own.
    """
    right = set(numbers)

    def cells(kind: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{kind} class="number">{value}</{kind}>' if at in right else f"<{kind}>{value}</{kind}>"
            for at, value in enumerate(values)
        )

    lines = [f"<tr>{cells('th', header)}</tr>"]
    for row in rows:
        own, values = (' class="own"', row[1:]) if row[0] is None else ("", row)
        lines.append(f"<tr{own}>{cells('td', values)}</tr>")
    return f'<div class="scroll"><table class="{style}">{chr(10).join(lines)}</table></div>\n'


def card(figure: str, *below: str) -> str:
    """A figure with what it is."""
    return (
        f'<div class="card"><div class="figure">{figure}</div>' + "".join(f"<div>{t}</div>" for t in below) + "</div>"
    )


def section(key: str, *parts: str, **values: object) -> str:
    """A heading and what stands under it; "" where there is nothing."""
    inside = "".join(parts)
    return f"<section><h2>{both(key, **values)}</h2>{inside}</section>\n" if inside else ""


def fact(key: str, value: object) -> str:
    """One entry of the list under the title."""
    return f"<li><b>{both(key)}</b> {html.escape(str(value))}</li>"


def duration(seconds: float) -> str:
    """Such as 41 s, 12 min 5 s or 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
