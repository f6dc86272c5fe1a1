"""Reports: what they say, in both languages, and how they look in a browser at phone and desktop widths."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bert_glue.report import charts, run_page, suite_page
from bert_glue.report.words import WORDS
from bert_glue.tasks import get_task

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<img src=x onerror="alert(1)">'


def split(task: str, value: float, **changes) -> dict:
    labels = list(get_task(task).labels)
    row = {"row": 3, "label": labels[0], "prediction": labels[1]}
    return {
        "suffix": "", "rows": 71, "value": value, "majority": 40 / 71, "standard_error": 0.059, "labels": labels,
        "confusion": [[30, 10], [15, 16]],
        "calibration": {"ece": 0.123, "bins": [[0.5, 0.6, 41, 0.55, 0.5], [0.9, 1.0, 30, 0.97, 0.8]]},
        "hardest": [{**row, "texts": [EVIL, "b & c"], "probability": 0.9, "loss": 2.3}],
        "explained": [{**row, "tokens": ["[CLS]", EVIL, "."], "scores": [0.1, -0.5, 0.2]}],
        **changes,
    }  # fmt: skip


def make_run(folder: Path, task: str = "wnli", value: float | None = 0.5775, **changes) -> Path:
    """The folder of a finished run, without training anything."""
    folder.mkdir(parents=True)
    row = get_task(task)
    results = {
        "task_name": task, "headline_metric": row.headline, "model_name_or_path": f"bert-{EVIL}", "data": EVIL,
        "sample_data": False, "device": "x", "device_name": "Some Device", "world_size": 1, "precision": "O2 bf16",
        "fallback": "", "batches": "packed", "seed": 42, "epoch": 1.0, "train_steps": 40, "train_loss": 0.7,
        "train_runtime": 75.2, "e2e_runtime": 90.0, "train_samples_per_second": 321.5, "eval_samples": 71,
        "eval_samples_per_second": 999.0, f"eval_{row.headline}": value, "eval_majority_baseline": 40 / 71,
        "seconds": {"data": 1.5}, **changes,
    }  # fmt: skip
    history = [{"step": n, "loss": 1 / n, "learning_rate": 2e-5 / n, "loss_scale": 1024.0} for n in range(1, 41)]
    history += [{"step": n, "eval_loss": 0.7, f"eval_{row.headline}": 0.5} for n in (20, 40)]
    (folder / "all_results.json").write_text(json.dumps(results))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    analysis = {"splits": {"validation": split(task, value)}} if row.num_labels == 2 else {}
    (folder / "analysis.json").write_text(json.dumps(analysis))
    (folder / "run.json").write_text(json.dumps({"packages": {"torch": "2.13.0"}, "arguments": {}}))
    return folder


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong order."""

    VOID = {"meta", "input", "br"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def checked(text: str) -> str:
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return text


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


def rows_of(page: str) -> list[list[str]]:
    """Cells of all tables, in English, without tags."""
    page = re.sub(r'<span class="zh".*?</span>', "", page)
    return [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line)]
        for line in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.S)
    ]


def test_the_page_is_one_file_without_network_or_script(run):
    page = checked(run_page.run_page(run))
    assert not re.search(r"""(src|href|url)\s*[=(]""", re.sub(r"&lt;.*?&gt;", "", page), re.IGNORECASE)
    assert not re.search(r"<(script|link|iframe|img)|@import|https?://", page, re.IGNORECASE)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_what_a_user_wrote_is_escaped(run):
    page = run_page.run_page(run)
    assert EVIL not in page and page.count("&lt;img src=x onerror=") >= 4  # model, data, error, token


def test_the_table_beside_published_figures(run):
    rows = rows_of(run_page.run_page(run))
    own = next(row for row in rows if row[0].startswith("this run"))
    assert own == ["this run, Some Device", "57.75", "5.90", "-", "-", "321.5"]
    majority = next(row for row in rows if row[0] == "most frequent class")
    assert majority == ["most frequent class", "56.34", "-", "+1.41", "within noise", "-"]
    npu = next(row for row in rows if "1p Ascend NPU" in row[0])
    assert npu == [
        "published: bert-large-cased, 1p Ascend NPU, 1 epochs",
        "54.69",
        "-",
        "+3.06",
        "within noise",
        "205.8",
    ]


def english(page: str) -> str:
    return re.sub(r"<[^>]+>", "", re.sub(r'<span class="zh".*?</span>', "", page))


def test_a_sentence_for_who_reads_nothing_else(tmp_path):
    """Above the table: the score, its standard error and where the published figures lie."""
    text = english(run_page.run_page(make_run(tmp_path / "a", value=0.5775)))
    assert "57.75, standard error 5.90: within noise of 5 published figure(s)" in text
    text = english(run_page.run_page(make_run(tmp_path / "b", value=0.71)))
    assert "71.00, standard error 5.90: within noise of 3 published figure(s); higher than 2, beyond noise" in text
    for changes, says in (
        ({"sample_data": True}, "Not comparable: this is generated sample data"),
        ({"eval_samples": 30}, "Not comparable: 30 rows"),
    ):
        page = run_page.run_page(make_run(tmp_path / says[-5:], **changes))
        assert says in english(page) and "standard error 5.90:" not in english(page) and 'class="strip"' not in page


def test_the_picture_of_a_row_says_what_its_verdict_says(tmp_path):
    """The dot lies in the shaded zone exactly where the difference is noise."""
    page = run_page.run_page(make_run(tmp_path / "run", value=0.71))
    rows = re.findall(r'class="strip">(.*?)</svg>.*?</td></tr>', page)
    assert len(rows) == 7
    seen = []
    for row in rows[1:]:
        left, width = (float(re.search(rf' {name}="([\d.]+)"', row)[1]) for name in ("x", "width"))
        style, dot = re.search(r'circle class="(\w+)" cx="([\d.]+)"', row).groups()
        assert (left <= float(dot) <= left + width) == (style == "soft")
        seen.append(style)
    assert seen == ["soft", "good", "soft", "good", "soft", "soft"]  # the majority, then as published


@pytest.mark.parametrize(("value", "verdict"), [(0.20, "lower, beyond noise"), (0.90, "higher, beyond noise")])
def test_a_large_difference_is_no_noise(tmp_path, value, verdict):
    rows = rows_of(run_page.run_page(make_run(tmp_path / "run", value=value)))
    assert all(row[4] == verdict for row in rows if "published" in row[0])


def test_noise_ends_at_twice_the_error_of_a_difference(tmp_path):
    edge = 0.5469 + 2 * 2**0.5 * 0.059
    for value, verdict in ((edge - 1e-4, "within noise"), (edge + 1e-4, "higher, beyond noise")):
        rows = rows_of(run_page.run_page(make_run(tmp_path / f"run{value}", value=value)))
        assert next(row for row in rows if "1p Ascend NPU" in row[0])[4] == verdict


@pytest.mark.parametrize("changes", [{"sample_data": True}, {"eval_samples": 30}])
def test_other_data_is_not_compared(tmp_path, changes):
    page = run_page.run_page(make_run(tmp_path / "run", **changes))
    published = [row for row in rows_of(page) if "published" in row[0]]
    assert len(published) == 5 and all(row[3:5] == ["-", "not comparable"] for row in published)
    if "eval_samples" in changes:
        assert "Not comparable: 30 rows were evaluated, GLUE has 71." in page


def test_a_model_no_better_than_the_majority_is_told(tmp_path):
    assert WORDS["at_majority"][0] in run_page.run_page(make_run(tmp_path / "a", value=40 / 71))
    assert WORDS["at_majority"][0] not in run_page.run_page(make_run(tmp_path / "b", value=0.6))


def test_a_value_that_does_not_exist_has_its_reason(tmp_path):
    page = run_page.run_page(make_run(tmp_path / "run", value=None, eval_accuracy_reason="no rows to score"))
    assert '<div class="figure">-</div>' in page and "no rows to score" in page


def test_curves_confusions_and_calibration_are_drawn(run):
    page = run_page.run_page(run)
    assert page.count("<polyline") == 6  # four curves, of which two have a second line
    assert page.count('class="chart"') == 5 and page.count('class="strip"') == 7  # a row of the comparison each
    assert "expected calibration error 0.123" in page and "75.0 %" in page


def test_files_of_an_earlier_run_are_not_shown(run):
    results = json.loads((run / "all_results.json").read_text())
    kept = {name: value for name, value in results.items() if not name.startswith(("eval_", "train_"))}
    (run / "all_results.json").write_text(json.dumps(kept))
    page = run_page.run_page(run)
    assert "<svg" not in page and WORDS["no_curve"][0] in page and "0.123" not in page


def test_diagnostic_categories(run):
    analysis = json.loads((run / "analysis.json").read_text())
    analysis["diagnostic"] = {"all": [0.3, 1104], "Logic": [None, 364]}
    (run / "analysis.json").write_text(json.dumps(analysis))
    rows = rows_of(run_page.run_page(run))
    assert ["all", "30.00", "1104"] in rows and ["Logic", "-", "364"] in rows


def test_every_phrase_has_two_languages_and_the_same_blanks():
    for key, (english, chinese) in WORDS.items():
        assert set(re.findall(r"{\w+}", english)) == set(re.findall(r"{\w+}", chinese)), key
        assert not re.search("[\u4e00-\u9fff]", english), key
        assert re.search("[\u4e00-\u9fff]", chinese) or english == chinese, key


@pytest.mark.parametrize(("locale", "language"), [("zh_CN.UTF-8", "zh"), ("en_US.UTF-8", "en"), ("", "en")])
def test_the_page_opens_in_the_language_of_the_locale(run, monkeypatch, locale, language):
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", locale)
    assert f'id="lang-{language}" checked' in run_page.run_page(run)


def suite(folder: Path) -> Path:
    for seed, value in enumerate((0.60, 0.70, 40 / 71)):
        make_run(folder / f"wnli-{seed}", value=value, seed=seed, model_name_or_path="x/bert")
    make_run(folder / "deep" / "cola-1", "cola", value=None, seed=1, model_name_or_path="x/bert")
    (folder / "cola-2").mkdir()
    (folder / "cola-2" / ".lock").write_text("")
    return folder


def test_a_suite_has_means_deviations_collapses_and_what_is_missing(tmp_path):
    page = checked(suite_page.suite_page(*suite_page.find_runs([suite(tmp_path / "suite")])))
    header, first, *_ = page[page.index("<table") :].split("</tr>")
    assert header.count("<th") == first.count("<td")
    rows = rows_of(page)
    own = ["wnliaccuracy x100bert", "3", "62.11", "7.07", "56.34 - 70.00", "56.34", "1", "43.66 - 56.34"]
    assert [*own, "1 min 30 s", "321.5"] in rows
    assert ["colamatthews_correlation x100bert", "1", "-", "-", "-", "56.34", "1"] in [row[:7] for row in rows]
    assert "4 runs of 2 task(s)" in page and "cola-2" in page
    assert page.count('class="ring"') == 1 and page.count('class="dot a soft"') == 2
    assert rows.index(next(r for r in rows if r[0].startswith("cola"))) < rows.index(
        next(r for r in rows if r[0].startswith("wnli"))
    )


def test_a_box_plot_holds_the_published_figures_and_the_majority():
    """On the scale where it is near, as a number where it would squeeze the rest."""
    seeds = [(62.0, False), (64.0, False)]
    near, far = (charts.boxes([("", seeds, majority, [58.3, 63.8])]) for majority in (57.0, 0.0))
    assert near.count('class="other"') == far.count('class="other"') == 2
    assert "line rule" in near and "\u25c2" not in near
    assert "line rule" not in far and "\u25c2 0.0" in far


def test_quartiles_and_ticks():
    assert charts.quartiles([4.0, 1.0, 2.0, 3.0]) == (1.75, 2.5, 3.25) and charts.quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert charts.ticks(0.0, 1.0) == pytest.approx([0, 0.5, 1.0]) and charts.ticks(3.0, 3.0) == [3.0]
    assert [charts.number(v) for v in (0, 0.5, 2e-5, 1024, 250000)] == ["0", "0.5", "2e-5", "1024", "2.5e5"]


def command(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bert_glue.report", *map(str, words)], capture_output=True, text=True, cwd=REPOSITORY
    )


def test_the_command(tmp_path, run):
    done = command(run)
    assert done.returncode == 0 and (run / "report.html").read_text().startswith("<!doctype html>")
    done = command(suite(tmp_path / "suite"))
    assert done.returncode == 0 and "4 runs" in (tmp_path / "suite" / "report.html").read_text()
    assert command(run, tmp_path / "suite", "--output", tmp_path / "all.html").returncode == 0
    assert "5 runs" in (tmp_path / "all.html").read_text()
    done = command(tmp_path / "none")
    assert done.returncode == 4 and "no such folder" in done.stderr and len(done.stderr.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    assert command(tmp_path / "empty").returncode == 4
    assert command(run, "--output", tmp_path / "no" / "x.html").returncode == 6


# In a browser

PROBE = """<!doctype html><meta charset=utf-8><body style="margin:0"><iframe id=f src="{source}"
style="width:{width}px;height:{height}px;border:0"></iframe><script>
const tell = () => {{ const d = document.getElementById('f').contentDocument;
  const wide = () => d.documentElement.scrollWidth, words = () => d.querySelector('main').innerText;
  const english = words(), first = wide(); d.querySelector('label[for=lang-zh]').click(); const chinese = words();
  document.title = JSON.stringify({{wide: [first, wide()], english, chinese,
    paper: getComputedStyle(d.body, null).backgroundColor}}); }};
document.getElementById('f').addEventListener('load', tell);
</script>"""


def browse(tmp_path: Path, page: Path, width: int, dark: bool) -> dict:
    """What a browser shows of a page: widths, words of both languages, the colour of the paper."""
    (tmp_path / "probe.html").write_text(PROBE.format(source=page.as_uri(), width=width, height=1400))
    words = [CHROMIUM, "--headless=new", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--no-sandbox"] if os.geteuid() == 0 else []  # the sandbox refuses root
    words += ["--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(width, 500)},1400"]
    words += ["--virtual-time-budget=3000", "--dump-dom", (tmp_path / "probe.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stdout[-500:] + done.stderr[-500:]
    import html

    return json.loads(html.unescape(title[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False), (1280, True)])
def test_in_a_browser(tmp_path, width, dark):
    folder = suite(tmp_path / "suite")
    (folder / "report.html").write_text(suite_page.suite_page(*suite_page.find_runs([folder])))
    (folder / "wnli-1" / "report.html").write_text(run_page.run_page(folder / "wnli-1"))
    for page, words, chinese in (
        (folder / "wnli-1" / "report.html", "Beside published figures", "与公布的结果对比"),
        (folder / "report.html", "Scores over seeds", "各种子的得分"),
    ):
        seen = browse(tmp_path, page, width, dark)
        assert max(seen["wide"]) <= width, "the page itself must not scroll sideways"
        assert words in seen["english"] and chinese not in seen["english"]
        assert chinese in seen["chinese"] and words not in seen["chinese"]
        brightness = sum(map(int, re.findall(r"\d+", seen["paper"])[:3]))
        assert brightness < 120 if dark else brightness > 700


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_screenshots_in_both_languages(tmp_path, run, monkeypatch):
    from matplotlib.image import imread

    pictures = {}
    for language in ("en", "zh"):
        monkeypatch.setattr("bert_glue.report.page.starts_chinese", lambda is_chinese=language == "zh": is_chinese)
        (run / "report.html").write_text(run_page.run_page(run))
        target = tmp_path / f"{language}.png"
        words = [CHROMIUM, "--headless=new", "--disable-gpu", f"--user-data-dir={tmp_path / language}"]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []
        words += ["--window-size=1280,1600", f"--screenshot={target}", (run / "report.html").as_uri()]
        subprocess.run(words, capture_output=True, timeout=120)
        pictures[language] = imread(target)[..., :3]
    for picture in pictures.values():
        assert picture.shape[:2] == (1600, 1280)
        assert 0.001 < (picture.std(2) > 0.05).mean() < 0.5  # coloured lines, mostly paper
    assert 0.005 < (pictures["en"] != pictures["zh"]).any(2).mean() < 0.9
