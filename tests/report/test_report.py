"""Reports: what they say, in both languages, and how they look in a browser at phone and desktop widths."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bert_glue.errors import MachineError
from bert_glue.report import charts, sections
from bert_glue.report.run_page import run_page
from bert_glue.report.suite_page import find_runs, interval, suite_page
from bert_glue.report.words import WORDS, Verdict, both
from bert_glue.results.records import Record
from bert_glue.tasks import get_task

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<img src=x onerror="alert(1)">'


def split(task: str, value: float, **changes) -> dict:
    labels = list(get_task(task).labels)
    row = {"row": 3, "label": labels[0], "prediction": labels[1]}
    shares = [
        {"precision": 30 / 45, "recall": 0.75, "f1": 60 / 85},
        {"precision": 16 / 26, "recall": 16 / 31, "f1": 0.5614},
    ]
    return {
        "suffix": "", "rows": 71, "value": value, "majority": 40 / 71, "standard_error": 0.059, "labels": labels,
        "classes": [{"label": labels[at], "rows": n, **shares[at]} for at, n in enumerate((40, 31))],
        "confused": [{"label": labels[1], "prediction": labels[0], "rows": 15}],
        "confusion": [[30, 10], [15, 16]],
        "calibration": {"ece": 0.123, "bins": [[0.5, 0.6, 41, 0.55, 0.5], [0.9, 1.0, 30, 0.97, 0.8]]},
        "hardest": [{**row, "texts": [EVIL, "b & c"], "probability": 0.9, "loss": 2.3}],
        "explained": [{**row, "tokens": ["[CLS]", EVIL, "."], "scores": [0.1, -0.5, 0.2]}],
        **changes,
    }  # fmt: skip


def make_run(folder: Path, task: str = "wnli", value: float | None = 0.5775, steps: int = 40, **changes) -> Path:
    """The folder of a finished run, without training anything."""
    folder.mkdir(parents=True)
    row = get_task(task)
    results = {
        "task_name": task, "headline_metric": row.headline, "model_name_or_path": f"bert-{EVIL}", "data": EVIL,
        "sample_data": False, "device": "x", "device_name": "Some Device", "world_size": 1, "precision": "O2 bf16",
        "fallback": "", "batches": "packed", "seed": 42, "epoch": 1.0, "train_steps": steps, "train_loss": 0.7,
        "train_runtime": 75.2, "e2e_runtime": 90.0, "train_samples_per_second": 321.5, "eval_samples": 71,
        "eval_samples_per_second": 999.0, f"eval_{row.headline}": value, "eval_majority_baseline": 40 / 71,
        f"eval_{row.headline}_standard_error": 0.059, "learning_rate": 2e-5, "seconds": {"data": 1.5}, **changes,
    }  # fmt: skip
    history = [{"step": n, "loss": 1 / n, "learning_rate": 2e-5 / n, "loss_scale": 1024.0} for n in range(1, steps + 1)]
    history += [{"step": n, "eval_loss": 0.7, f"eval_{row.headline}": 0.5} for n in range(20, steps + 1, 20)]
    (folder / "all_results.json").write_text(json.dumps(results))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    analysis = {"splits": {"validation": split(task, value)}} if row.num_labels == 2 else {}
    (folder / "analysis.json").write_text(json.dumps(analysis))
    origin = {"started": "2026-11-26T09:12:44+00:00", "packages": {"torch": "2.13.0"}, "arguments": {}}
    (folder / "run.json").write_text(json.dumps(origin))
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


def english_words(key: str) -> str:
    return WORDS[key][0]


def rows_of(page: str) -> list[list[str]]:
    """Cells of all tables, in English, without tags."""
    page = re.sub(r'<span class="zh".*?</span>', "", page)
    return [
        [
            " ".join(re.sub(r"<[^>]+>", " ", cell).split())
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line, re.S)
        ]
        for line in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.S)
    ]


def test_the_page_is_one_file_without_network(run):
    page = checked(run_page(run))
    assert not re.search(r"""(src|href|url)\s*[=(]""", re.sub(r"&lt;.*?&gt;", "", page), re.IGNORECASE)
    assert not re.search(r"<(link|iframe|img)|@import|https?://", page, re.IGNORECASE)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page and "@media print" in page


def test_only_our_script_may_run(run):
    """The policy of the page names the hash of its one script, so that no other would run."""
    page = run_page(run)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == page.lower().count("<script") == 1
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_the_title_is_task_model_and_date(tmp_path):
    page = run_page(make_run(tmp_path / "a", model_name_or_path="/home/me/models/my-bert/"))
    assert "<h1>WNLI: my-bert, 2026-11-26</h1>" in page and "<title>WNLI: my-bert, 2026-11-26</title>" in page


def test_own_data_is_called_by_its_file(tmp_path):
    folder = make_run(tmp_path / "a", task_name="own", model_name_or_path="a/b")
    (folder / "run.json").write_text(json.dumps({"arguments": {"train_file": "/home/me/tickets.csv"}}))
    page = run_page(folder)
    assert "<h1>tickets: b</h1>" in page and english_words("compare") not in page


def test_what_a_user_wrote_is_escaped(run):
    page = run_page(run)
    assert EVIL not in page and page.count("&lt;img src=x onerror=") >= 4  # model, data, error, token


ANYTHING = [EVIL, None, True, 7, -1e308, 10**400, [EVIL], {"x": EVIL}, [[EVIL]], {}, [], "", "\ud800"]


@pytest.mark.parametrize("name", ["all_results.json", "analysis.json", "trainer_state.json", "run.json"])
def test_values_of_any_type_make_a_page_without_markup(run, name):
    """One value of a file at a time is replaced by something that no run writes."""
    whole = json.loads((run / name).read_text())
    for at, path in enumerate(places(whole)):
        broken = json.loads(json.dumps(whole))
        *above, last = path
        inside = broken
        for key in above:
            inside = inside[key]
        inside[last] = ANYTHING[at % len(ANYTHING)]
        (run / name).write_text(json.dumps(broken))
        pages = []
        with suppress(MachineError):  # of the results, task and metric are needed
            pages = [run_page(run), suite_page(find_runs([run]))]
        assert all(EVIL not in checked(page) for page in pages) and (pages or last in ("task_name", "headline_metric"))


def places(value, path=()):
    """Paths of everything in a JSON value, without the long history's."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inside in entries:
        yield (*path, key)
        yield from places(inside, (*path, key))


def test_what_was_left_out_is_told(tmp_path):
    page = run_page(make_run(tmp_path / "run", seed=EVIL))
    assert english_words("ignored") in page and "all_results.json seed" in page


def test_the_table_beside_published_figures(run):
    rows = rows_of(run_page(run))
    own = next(row for row in rows if row[0].startswith("This run"))
    assert own == ["This run , Some Device", "57.75", "-", "-", "321.5"]
    majority = next(row for row in rows if row[0] == "Most frequent class")
    assert majority == ["Most frequent class", "56.34", "+1.41", "within noise", "-"]
    npu = next(row for row in rows if "1p Ascend NPU" in row[0])
    assert npu == ["Published: bert-large-cased, 1p Ascend NPU, 1 epochs", "54.69", "+3.06", "within noise", "205.8"]


def english(page: str) -> str:
    return re.sub(r"<[^>]+>", "", re.sub(r'<span class="zh".*?</span>', "", page))


def test_a_sentence_for_who_reads_nothing_else(tmp_path):
    """Above the table: the score, its standard error and where the published figures lie."""
    text = english(run_page(make_run(tmp_path / "a", value=0.5775)))
    assert (
        "The score 57.75 (validation) has a standard error of 5.90. It is within noise of 5 published figure(s)."
        in text
    )
    text = english(run_page(make_run(tmp_path / "b", value=0.71)))
    assert "It is within noise of 3 published figure(s); higher than 2, beyond noise." in text


def test_the_picture_of_a_row_says_what_its_verdict_says(tmp_path):
    """The dot lies in the shaded zone exactly where the difference is noise."""
    page = run_page(make_run(tmp_path / "run", value=0.71))
    rows = re.findall(r'class="strip".*?>(.*?)</svg>', page, re.S)
    assert len(rows) == 7  # this run, the most frequent class, five published
    seen = []
    for row in rows[1:]:
        left, width = (float(re.search(rf' {name}="([\d.]+)"', row)[1]) for name in ("x", "width"))
        style, dot = re.search(r'circle class="(\w+)" cx="([\d.]+)"', row).groups()
        assert (left <= float(dot) <= left + width) == (style == "soft")
        seen.append(style)
    assert seen == ["soft", "good", "soft", "good", "soft", "soft"]  # the majority, then as published


@pytest.mark.parametrize(("value", "verdict"), [(0.20, "lower, beyond noise"), (0.90, "higher, beyond noise")])
def test_a_large_difference_is_no_noise(tmp_path, value, verdict):
    rows = rows_of(run_page(make_run(tmp_path / "run", value=value)))
    assert all(row[3] == verdict for row in rows if "Published" in row[0])


def test_noise_ends_at_twice_the_error_of_a_difference(tmp_path):
    edge = 0.5469 + 2 * 2**0.5 * 0.059
    for value, verdict in ((edge - 1e-4, "within noise"), (edge + 1e-4, "higher, beyond noise")):
        rows = rows_of(run_page(make_run(tmp_path / f"run{value}", value=value)))
        assert next(row for row in rows if "1p Ascend NPU" in row[0])[3] == verdict


def test_other_rows_are_not_compared(tmp_path):
    page = run_page(make_run(tmp_path / "run", eval_samples=30))
    published = [row for row in rows_of(page) if "Published" in row[0]]
    assert len(published) == 5 and all(row[2:4] == ["-", "not comparable"] for row in published)
    assert "Not comparable: this run evaluated 30 rows, GLUE has 71." in page and 'class="strip"' not in page


def test_a_sample_is_not_held_beside_glue(tmp_path):
    page = run_page(make_run(tmp_path / "run", sample_data=True))
    assert english_words("compare") not in page and "sample data, not GLUE" in page


def test_a_model_no_better_than_the_majority_is_told(tmp_path):
    assert WORDS["at_majority"][0] in run_page(make_run(tmp_path / "a", value=40 / 71))
    assert WORDS["at_majority"][0] not in run_page(make_run(tmp_path / "b", value=0.6))


def test_a_value_that_does_not_exist_has_its_reason(tmp_path):
    page = run_page(make_run(tmp_path / "run", value=None, eval_accuracy_reason="no rows to score"))
    assert '<div class="figure">-' in page and "no rows to score" in page


def test_curves_confusions_and_calibration_are_drawn(run):
    page = run_page(run)
    assert page.count('class="chart"') == 4 and page.count('class="strip"') == 7
    # raw, smoothed and evaluated loss; score and majority; rate; the diagonal of the calibration
    assert page.count("<polyline") == 7
    assert "Expected calibration error 0.123" in page and "75.0 %" in page
    rows = rows_of(page)
    assert ["entailment", "61.54", "51.61", "56.14", "31"] in rows
    assert ["entailment", "not_entailment", "15", "48.4 %"] in rows


def test_one_point_is_no_curve(tmp_path):
    page = run_page(make_run(tmp_path / "run", steps=1))
    assert "<h2>" + str(both("curves")) not in page and "<polyline" in page  # the calibration's only


def test_files_of_an_earlier_run_are_not_shown(run):
    results = json.loads((run / "all_results.json").read_text())
    kept = {name: value for name, value in results.items() if not name.startswith(("eval_", "train_"))}
    (run / "all_results.json").write_text(json.dumps(kept))
    page = run_page(run)
    assert "<svg" not in page and english_words("no_score") in page and "0.123" not in page


def many_classes(count: int) -> dict:
    labels = [f"a class with a name of some length, number {at}" for at in range(count)]
    shares = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3}
    found = {
        "classes": [{"label": label, "rows": 10, **shares} for label in labels],
        "confused": [{"label": labels[at], "prediction": labels[at + 1], "rows": 9 - at} for at in range(5)],
    }
    if count <= 50:
        found |= {"labels": labels, "confusion": [[int(a == b) for a in range(count)] for b in range(count)]}
    return found


@pytest.mark.parametrize(("count", "style"), [(10, "heat"), (11, "heat dense"), (50, "heat dense"), (1200, None)])
def test_many_classes(tmp_path, count, style):
    folder = make_run(tmp_path / "run", task_name="own", headline_metric="accuracy", eval_accuracy=0.25)
    base = split("wnli", 0.25) | {"labels": [], "confusion": []}
    texts = ["a text of a hundred words " * 20] * 2
    hardest = [{**base["hardest"][0], "texts": texts}] * 100
    (folder / "analysis.json").write_text(
        json.dumps({"splits": {"validation": base | many_classes(count) | {"hardest": hardest}}})
    )
    page = checked(run_page(folder))
    assert re.findall(r'<table class="(heat.*?)"', page) == ([style] if style else [])
    assert "Macro average: precision 50.00, recall 25.00, F1 33.33" in page
    assert len(page.encode()) < 2_000_000


def test_diagnostic_categories(run):
    analysis = json.loads((run / "analysis.json").read_text())
    analysis["diagnostic"] = {"all": [0.3, 1104], "Logic": [None, 364]}
    (run / "analysis.json").write_text(json.dumps(analysis))
    rows = rows_of(run_page(run))
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
    assert f'id="lang-{language}" checked' in run_page(run)


def suite(folder: Path) -> Path:
    for seed, value in enumerate((0.60, 0.70, 40 / 71)):
        changes = {"eval_collapsed": "all 71 predictions are not_entailment"} if seed == 2 else {}
        make_run(folder / f"wnli-{seed}", value=value, seed=seed, model_name_or_path="x/bert", **changes)
    make_run(folder / "deep" / "cola-1", "cola", value=None, seed=1, model_name_or_path="x/bert")
    (folder / "cola-2").mkdir()
    (folder / "cola-2" / ".lock").write_text("")
    return folder


def test_a_suite_has_means_deviations_collapses_and_what_is_missing(tmp_path):
    page = checked(suite_page(find_runs([suite(tmp_path / "suite")])))
    header, first, *_ = page[page.index("<table") :].split("</tr>")
    assert header.count("<th") - 1 == first.count("<td")  # <thead> is one more
    rows = [row[:8] for row in rows_of(page)]
    setting = "bert learning rate 2e-5 , O2 bf16"
    assert ["WNLI Accuracy", setting, "3", "62.11 [44.55, 79.68]", "7.07", "1", "56.34", "43.66 – 56.34"] in rows
    assert ["CoLA Matthews correlation", setting, "1", "-", "-", "0", "56.34", "56.53 – 63.81"] in rows
    assert "4 runs of 2 task(s)" in page and "cola-2" in page
    assert page.count('class="ring"') == 1 and page.count('class="dot"') == 2
    assert page.index("<b>CoLA</b>") < page.index("<b>WNLI</b>")


def settings_suite(folder: Path, effect: float, seeds: int = 5) -> Path:
    """Two settings that differ in the learning rate, by `effect` and some noise that differs by seed."""
    for seed in range(seeds):
        base = 0.60 + 0.02 * seed
        make_run(folder / f"a{seed}", value=base, seed=seed, learning_rate=2e-5, model_name_or_path="bert")
        value = base + effect + 0.004 * (-1) ** seed
        make_run(folder / f"b{seed}", value=value, seed=seed, learning_rate=5e-5, model_name_or_path="bert")
    return folder


def pairs_of(folder: Path) -> list:
    from bert_glue.report.suite_page import task_groups

    (group,) = task_groups(find_runs([folder]).runs)
    assert len(group.settings) == 2
    return group.pairs


@pytest.mark.parametrize(
    ("effect", "verdict"), [(-0.05, Verdict.LOWER), (-0.001, Verdict.NOISE), (0.05, Verdict.LOWER)]
)
def test_two_settings_are_two_rows_and_compared_seed_by_seed(tmp_path, effect, verdict):
    """Paired by seed: the spread of the seeds, larger than the effect, falls out."""
    from scipy.stats import ttest_rel

    (pair,) = pairs_of(settings_suite(tmp_path / "suite", effect))
    assert pair.verdict is verdict and pair.seeds == 5
    mine, best = (list(one.by_seed().values()) for one in (pair.setting, pair.best))
    ends = ttest_rel(mine, best).confidence_interval(0.95)
    assert pair.interval == pytest.approx((ends.low, ends.high))
    page = checked(suite_page(find_runs([tmp_path / "suite"])))
    assert english_words("best") in page and 'class="own"' in page


def test_one_seed_in_common_is_no_verdict(tmp_path):
    (pair,) = pairs_of(settings_suite(tmp_path / "suite", -0.05, seeds=1))
    assert pair.verdict is Verdict.TOO_FEW and pair.interval is None


def test_any_flag_of_training_makes_another_setting(tmp_path):
    for at, (flag, value) in enumerate([("weight_decay", 0.0), ("weight_decay", 0.1), ("logging_steps", 7)]):
        folder = make_run(tmp_path / str(at), seed=at, model_name_or_path="bert")
        arguments = {"weight_decay": 0.0, "logging_steps": 1, "output_dir": str(folder), "seed": at} | {flag: value}
        (folder / "run.json").write_text(json.dumps({"arguments": arguments}))
    page = suite_page(find_runs([tmp_path]))
    seeds = [row[2] for row in rows_of(page) if row[0] == "WNLI Accuracy"]
    assert seeds == ["2", "1"] and "weight_decay 0.1" in page and "logging_steps" not in page


def test_a_run_that_cannot_be_read_is_named(tmp_path):
    make_run(tmp_path / "suite" / "good")
    make_run(tmp_path / "suite" / "bad").joinpath("all_results.json").write_text("[1]")
    page = suite_page(find_runs([tmp_path / "suite"]))
    assert english_words("unreadable") in page and "not a JSON object" in page


def test_an_interval_is_students():
    from scipy.stats import t

    values = [61.0, 62.5, 60.2, 64.1]
    mean, spread = sum(values) / 4, (sum((v - sum(values) / 4) ** 2 for v in values) / 3) ** 0.5
    assert interval(values) == pytest.approx(t.interval(0.95, 3, loc=mean, scale=spread / 2))
    assert interval([61.0]) is None and interval([61.0, 61.0]) == (61.0, 61.0)


def test_a_chart_of_seeds_leaves_out_a_majority_that_would_squeeze_it():
    rows = [charts.SeedRow("", ((62.0, False), (64.0, False)), 63.0, None)]
    near, far = (charts.seed_chart(rows, [58.3, 63.8], majority) for majority in (57.0, 0.0))
    assert near.majority == 57.0 and near.x.low <= 57.0
    assert far.majority is None and far.x.low > 50.0


@pytest.mark.parametrize(
    ("values", "low", "limits"),
    [
        ((0.1, 0.9), 0.0, (0.0, 1.0)),
        ((62.0, 87.0), None, (60.0, 90.0)),
        ((7.0, 7.0), 0.0, (0.0, 8.0)),
        ((0.0,), 0.0, (0.0, 1.0)),
    ],
)  # fmt: skip
def test_an_axis_ends_at_its_ticks(values, low, limits):
    found = charts.axis(values, low=low)
    assert (found.low, found.high) == pytest.approx(limits)
    assert found.ticks[0] == found.low and found.ticks[-1] == pytest.approx(found.high)


@pytest.mark.parametrize("values", [(1e308, -1e308), (5e-324, 0.0), (3.0, 3.0 + 1e-15), (-2.0, -1.0), (1e-5, 3e-5)])
def test_an_axis_takes_any_numbers(values):
    found = charts.axis(values)
    assert found.low < found.high and 1 < len(found.ticks) < 12
    assert all(0.0 <= found.share(value) <= 1.0 for value in values)


def test_a_smoothed_line_keeps_a_straight_one():
    line = [(float(n), 3.0 * n) for n in range(200)]
    assert [y for _, y in charts.smoothed(line)] == pytest.approx([y for _, y in line])
    jagged = [(float(n), float(n % 2)) for n in range(200)]
    assert all(0.3 < y < 0.7 for _, y in charts.smoothed(jagged)[5:-5])


def test_a_thinned_line_keeps_its_ends_and_its_spike():
    line = [(float(n), 1.0) for n in range(10_000)]
    line[5_001] = (5_001.0, 9.0)
    kept = charts.thinned(line)
    assert len(kept) <= 402 and (5_001.0, 9.0) in kept and kept == sorted(kept)


def test_ticks_are_short():
    assert [charts.number(v) for v in (0, 0.5, 2e-5, 1024, 250000)] == ["0", "0.5", "2e-5", "1024", "2.5e5"]


def test_a_record_gives_values_of_their_types_only():
    record = Record({"n": 1.5, "b": True, "t": "x", "l": [1, "2"], "o": {"n": "1"}, "huge": 10**400}, "a.json")
    assert record.number("n") == 1.5 and record.number("b") is None and record.number("huge") is None
    assert record.text("t") == "x" and record.text("n", "-") == "-" and record.numbers("l") == []
    assert record.part("o").number("n") is None and record.part("absent").values == {}
    assert record.ignored == ["a.json b", "a.json huge", "a.json n", "a.json l", "a.json o n"]


def test_verdicts_need_a_standard_error():
    score = sections.Score("validation", 71, 0.6, None, None, (), "")
    assert sections.comparison(get_task("wnli"), Record({}), [score]).rows[0].distinct_verdicts == []


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
    (folder / "report.html").write_text(suite_page(find_runs([folder])))
    (folder / "wnli-1" / "report.html").write_text(run_page(folder / "wnli-1"))
    for page, words, chinese in (
        (folder / "wnli-1" / "report.html", "Comparison with published figures", "与公布的结果对比"),
        (folder / "report.html", "Scores by seed", "各种子的得分"),
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
        (run / "report.html").write_text(run_page(run))
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
