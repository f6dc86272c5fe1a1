"""How reports look in a browser, at phone and desktop widths, light and dark."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from finished_runs import make_run, many_classes, split, suite

from bert_glue.report.run_page import run_page
from bert_glue.report.suite_page import find_runs, suite_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

# Opens a page in a frame and puts what it measures into its own title.
PROBE = """<!doctype html><meta charset=utf-8><body style="margin:0"><iframe id=f src="{source}"
style="width:{width}px;height:1400px;border:0"></iframe><script>
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const rgb = (text) => text.startsWith("color(") ? numbers(text).map((v, at) => at < 3 ? 255 * v : v) : numbers(text);
const luminance = (colour) => colour.slice(0, 3).map((v) => v / 255)
  .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
const contrast = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
document.getElementById('f').addEventListener('load', () => {{
  const w = document.getElementById('f').contentWindow, d = w.document;
  const behind = (node) => {{
    const [r, g, b, alpha = 1] = rgb(w.getComputedStyle(node).backgroundColor);
    if (alpha === 1 || !node.parentElement) return [r, g, b];
    return behind(node.parentElement).map((under, at) => alpha * [r, g, b][at] + (1 - alpha) * under);
  }};
  const faint = () => [...d.querySelectorAll("main *")].filter((node) => node.getClientRects().length &&
    [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())).filter((node) => {{
      const style = w.getComputedStyle(node);
      return contrast(luminance(rgb(node.closest("svg") ? style.fill : style.color)), luminance(behind(node))) < 4.5;
    }}).map((node) => node.outerHTML.slice(0, 200));
  const wide = () => d.documentElement.scrollWidth, words = () => d.querySelector('main').innerText;
  const seen = {{wide: [wide()], english: words(), faint: faint(), paper: w.getComputedStyle(d.body).backgroundColor}};
  d.querySelector('label[for=lang-zh]').click();
  Object.assign(seen, {{chinese: words(), requests: w.performance.getEntriesByType("resource").length}});
  seen.wide.push(wide());
  const field = d.querySelector('input[type=search]');
  if (field) {{
    const rows = [...field.closest("label").nextElementSibling.querySelectorAll("tbody tr")];
    field.value = rows[0].cells[1].innerText.slice(0, 60);
    field.dispatchEvent(new Event("input"));
    const before = rows.length, after = rows.filter((row) => !row.hidden).length;
    field.value = "nothing has these words";
    field.dispatchEvent(new Event("input"));
    seen.rows = [before, after, rows.filter((row) => !row.hidden).length];
  }}
  document.title = JSON.stringify(seen);
}});
</script>"""


def chromium(tmp_path: Path, *words: str) -> str:
    """Its output; the browser may ask no server."""
    call = [CHROMIUM, "--headless=new", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    call += ["--no-sandbox"] if os.geteuid() == 0 else []  # the sandbox refuses root
    call += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"]
    done = subprocess.run([*call, *words], capture_output=True, text=True, timeout=120)
    return done.stdout


def browse(tmp_path: Path, page: Path, width: int, dark: bool) -> dict:
    """What a browser shows of a page: widths, words, texts of low contrast, requests, rows of the first search."""
    (tmp_path / "probe.html").write_text(PROBE.format(source=page.as_uri(), width=width))
    shown = chromium(
        tmp_path,
        "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={max(width, 500)},1400",
        "--virtual-time-budget=3000",
        "--dump-dom",
        (tmp_path / "probe.html").as_uri(),
    )
    title = re.search(r"<title>(.*?)</title>", shown, re.S)
    assert title, shown[-500:]
    return json.loads(html.unescape(title[1]))


def pages(folder: Path) -> dict[str, str]:
    """A page of every kind."""
    runs = suite(folder / "suite")
    regression = make_run(folder / "stsb", "stsb", 0.89, eval_majority_baseline=None)
    points = {"points": [[n / 60, n / 70] for n in range(300)], "hardest": split("wnli", 0.5)["hardest"] * 12}
    (regression / "analysis.json").write_text(json.dumps({"splits": {"validation": {"rows": 300, **points}}}))
    many = make_run(folder / "many", task_name="own", headline_metric="accuracy", eval_accuracy=0.25)
    (many / "analysis.json").write_text(json.dumps({"splits": {"validation": {"rows": 9, **many_classes(40)}}}))
    return {
        "classes": run_page(runs / "wnli-1"),
        "regression": run_page(regression),
        "many": run_page(many),
        "suite": suite_page(find_runs([runs])),
    }


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_in_a_browser(tmp_path, width, dark):
    expected = {
        "classes": ("Comparison with published figures", "与公布的结果对比"),
        "regression": ("Errors with the highest loss", "损失最高的错误"),
        "many": ("Confusion matrix", "混淆矩阵"),
        "suite": ("Scores by seed", "各种子的得分"),
    }
    for kind, page in pages(tmp_path).items():
        (tmp_path / "page.html").write_text(page)
        seen = browse(tmp_path, tmp_path / "page.html", width, dark)
        words, chinese = expected[kind]
        assert max(seen["wide"]) <= width, "the page itself must not scroll sideways"
        assert words in seen["english"] and chinese not in seen["english"]
        assert chinese in seen["chinese"] and words not in seen["chinese"]
        assert seen["faint"] == [] and seen["requests"] == 0
        brightness = sum(map(int, re.findall(r"\d+", seen["paper"])[:3]))
        assert brightness < 120 if dark else brightness > 700
        if kind != "suite":
            before, found, nothing = seen["rows"]
            assert before >= found >= 1 and nothing == 0


def test_screenshots_in_both_languages(tmp_path, monkeypatch):
    from matplotlib.image import imread

    run = make_run(tmp_path / "run")
    pictures = {}
    for language in ("en", "zh"):
        monkeypatch.setattr("bert_glue.report.page.starts_chinese", lambda is_chinese=language == "zh": is_chinese)
        (run / "report.html").write_text(run_page(run))
        target = tmp_path / f"{language}.png"
        chromium(tmp_path, "--window-size=1280,1600", f"--screenshot={target}", (run / "report.html").as_uri())
        pictures[language] = imread(target)[..., :3]
    for picture in pictures.values():
        assert picture.shape[:2] == (1600, 1280)
        assert 0.001 < (picture.std(2) > 0.05).mean() < 0.5  # coloured lines, mostly paper
    assert 0.005 < (pictures["en"] != pictures["zh"]).any(2).mean() < 0.9
