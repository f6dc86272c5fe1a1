"""The page of one run: its content in both languages, and that nothing in the files of a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from finished_runs import EVIL, checked, english, english_words, make_run, many_classes, rows_of, split, suite

from bert_glue.errors import MachineError
from bert_glue.report import sections
from bert_glue.report.run_page import run_page
from bert_glue.report.suite_page import find_runs, suite_page
from bert_glue.report.words import WORDS, both
from bert_glue.results.records import Record
from bert_glue.tasks import get_task

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run")


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


def test_a_step_that_is_none_draws_nothing(run):
    entries = [{"step": step, "loss": 1.0} for step in (-3, 0, None, "x", float("inf"))]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert "<h2>" + str(both("curves")) not in run_page(run)


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
    assert majority == ["Most frequent class", "56.34", "+1.41", "within the margin of error", "-"]
    npu = next(row for row in rows if "1p Ascend NPU" in row[0])
    assert npu == [
        "Published: bert-large-cased, 1p Ascend NPU, epochs: 1",
        "54.69",
        "+3.06",
        "within the margin of error",
        "205.8",
    ]


def test_a_sentence_for_who_reads_nothing_else(tmp_path):
    """Above the table: the score, its standard error and where the published figures lie."""
    text = english(run_page(make_run(tmp_path / "a", value=0.5775)))
    assert (
        "The score 57.75 (validation) has a standard error of 5.90. Published figures: 5 within the margin of error."
        in text
    )
    text = english(run_page(make_run(tmp_path / "b", value=0.71)))
    assert "Published figures: 3 within the margin of error; 2 lower, beyond the margin of error." in text


def test_the_picture_of_a_row_says_what_its_verdict_says(tmp_path):
    """The dot is in the shaded area exactly if the difference is within the margin of error."""
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


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.20, "lower, beyond the margin of error"), (0.90, "higher, beyond the margin of error")]
)
def test_a_large_difference_is_no_noise(tmp_path, value, verdict):
    rows = rows_of(run_page(make_run(tmp_path / "run", value=value)))
    assert all(row[3] == verdict for row in rows if "Published" in row[0])


def test_noise_ends_at_twice_the_error_of_a_difference(tmp_path):
    edge = 0.5469 + 2 * 2**0.5 * 0.059
    for value, verdict in (
        (edge - 1e-4, "within the margin of error"),
        (edge + 1e-4, "higher, beyond the margin of error"),
    ):
        rows = rows_of(run_page(make_run(tmp_path / f"run{value}", value=value)))
        assert next(row for row in rows if "1p Ascend NPU" in row[0])[3] == verdict


def test_other_rows_are_not_compared(tmp_path):
    page = run_page(make_run(tmp_path / "run", eval_samples=30))
    published = [row for row in rows_of(page) if "Published" in row[0]]
    assert len(published) == 5 and all(row[2:4] == ["-", "not comparable"] for row in published)
    assert "Not comparable: this run evaluated 30 rows, but GLUE has 71." in page and 'class="strip"' not in page


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
    for key, (first, second) in WORDS.items():
        assert set(re.findall(r"{\w+}", first)) == set(re.findall(r"{\w+}", second)), key
        assert not re.search("[\u4e00-\u9fff]", first), key
        assert re.search("[\u4e00-\u9fff，；。]", second) or first == second, key


@pytest.mark.parametrize(("locale", "language"), [("zh_CN.UTF-8", "zh"), ("en_US.UTF-8", "en"), ("", "en")])
def test_the_page_opens_in_the_language_of_the_locale(run, monkeypatch, locale, language):
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", locale)
    assert f'id="lang-{language}" checked' in run_page(run)


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
    odd = run.rename(run.with_name("a\udcff"))  # a name that is no UTF-8
    assert command(odd).returncode == 0 and (odd / "report.html").is_file()
