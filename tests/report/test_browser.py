"""How reports look in a browser, at phone and desktop widths, light and dark."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from finished_runs import make_run, many_classes, split, suite
from matplotlib.image import imread

from bert_glue.errors import MachineError
from bert_glue.report.run_page import run_page
from bert_glue.report.suite_page import find_runs, suite_page
from bert_glue.report.words import WORDS
from tools import make_pictures
from tools.make_pictures import browse

pytestmark = pytest.mark.skipif(make_pictures.chromium() is None, reason="no chromium here")

# Opens pages in frames and puts what it measures of each into its own title.
PROBE = """<!doctype html><meta charset=utf-8><body style="margin:0">{frames}<script>
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const rgb = (text) => text.startsWith("color(") ? numbers(text).map((v, at) => at < 3 ? 255 * v : v) : numbers(text);
const luminance = (colour) => colour.slice(0, 3).map((v) => v / 255)
  .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
const contrast = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
const measure = (frame) => {{
  const w = frame.contentWindow, d = w.document;
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
  return seen;
}};
window.addEventListener("load", () => {{
  const frames = [...document.querySelectorAll("iframe")];
  document.title = JSON.stringify(Object.fromEntries(frames.map((frame) => [frame.id, measure(frame)])));
}});
</script>"""
FRAME = '<iframe id="{kind}" src="{source}" style="width:{width}px;height:1400px;border:0"></iframe>'


def browse_pages(folder: Path, found: dict[str, str], width: int, dark: bool) -> dict[str, dict]:
    """What a browser shows of each page: widths, words, texts of low contrast, requests, rows of the first search."""
    frames = ""
    for kind, page in found.items():
        (folder / f"{kind}.html").write_text(page)
        frames += FRAME.format(kind=kind, source=f"{kind}.html", width=width)
    (folder / "probe.html").write_text(PROBE.format(frames=frames))
    shown = browse([
        "--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--window-size={max(width, 500)},1400", "--virtual-time-budget=3000", "--dump-dom",
        (folder / "probe.html").as_uri(),
    ])  # fmt: skip
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
    more = make_run(folder / "more", task_name="own", headline_metric="accuracy", eval_accuracy=0.25)
    (more / "analysis.json").write_text(json.dumps({"splits": {"validation": {"rows": 9, **many_classes(150)}}}))
    sets = make_run(
        folder / "sets", task_name="own", headline_metric="f1_micro", eval_f1_micro=0.71, label_threshold=0.5,
        problem_type="multi_label_classification",
    )  # fmt: skip
    shares = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "predicted": 12}
    classes = [{"label": label, "rows": 10, **shares} for label in ("art", "news and current affairs", "science")]
    hardest = [{**row, "label": "art;science", "prediction": "art"} for row in points["hardest"]]
    (sets / "analysis.json").write_text(
        json.dumps({"splits": {"validation": {"rows": 30, "classes": classes, "hardest": hardest}}})
    )
    return {
        "classes": run_page(runs / "wnli-1"),
        "regression": run_page(regression),
        "many": run_page(many),
        "150 classes": run_page(more),
        "several labels": run_page(sets),
        "suite": suite_page(find_runs([runs])),
    }


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_in_a_browser(tmp_path, width, dark):
    expected = {
        "classes": ("Comparison with published figures", "与公布的结果对比"),
        "regression": ("Errors with the highest loss", "损失最高的错误"),
        "many": ("Confusion matrix", "混淆矩阵"),
        "150 classes": ("Most confused classes", WORDS["pairs"][1]),
        "several labels": ("Errors with the highest loss", "损失最高的错误"),
        "suite": ("Scores by seed", "各种子的得分"),
    }
    for kind, seen in browse_pages(tmp_path, pages(tmp_path), width, dark).items():
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
    run = make_run(tmp_path / "run")
    pictures = {}
    for language in ("en", "zh"):
        monkeypatch.setattr("bert_glue.report.page.starts_chinese", lambda is_chinese=language == "zh": is_chinese)
        (run / "report.html").write_text(run_page(run))
        target = tmp_path / f"{language}.png"
        make_pictures.take(run / "report.html", target, "light", width=1280, height=1600)
        pictures[language] = imread(target)[..., :3]
    for picture in pictures.values():
        assert picture.shape[:2] == (1600, 1280)
        assert 0.001 < (picture.std(2) > 0.05).mean() < 0.5  # coloured lines, mostly paper
    assert 0.005 < (pictures["en"] != pictures["zh"]).any(2).mean() < 0.9


def test_the_pictures_of_the_readmes_are_made_from_a_run(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(MachineError, match="has no report.html"):
        make_pictures.make_pictures(run, tmp_path)
    (run / "report.html").write_text(run_page(run))
    make_pictures.make_pictures(run, tmp_path / "images")
    sizes = {}
    for scheme in ("light", "dark"):
        picture = imread(tmp_path / "images" / f"report-{scheme}.png")
        assert picture.shape[:2] == (make_pictures.HEIGHT, make_pictures.WIDTH)
        sizes[scheme] = picture[..., :3].mean()
    assert sizes["dark"] < 0.3 < 0.7 < sizes["light"]
