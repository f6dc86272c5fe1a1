"""The page over many runs: rows by setting, means, and settings compared seed by seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished_runs import checked, english_words, make_run, rows_of, suite

from bert_glue.report.suite_page import find_runs, interval, suite_page
from bert_glue.report.words import Verdict


def test_a_suite_has_means_deviations_collapses_and_what_is_missing(tmp_path):
    page = checked(suite_page(find_runs([suite(tmp_path / "suite")])))
    header, first, *_ = page[page.index("<table") :].split("</tr>")
    assert header.count("<th") - 1 == first.count("<td")  # <thead> is one more
    rows = [row[:8] for row in rows_of(page)]
    setting = "bert learning rate 2e-5 , O2 bf16"
    assert ["WNLI Accuracy", setting, "3", "62.11 [44.55, 79.68]", "7.07", "1", "56.34", "43.66 – 56.34"] in rows
    assert ["CoLA Matthews correlation", setting, "1", "-", "-", "0", "56.34", "56.53 – 63.81"] in rows
    assert "Runs: 4, tasks: 2" in page and "cola-2" in page
    assert page.count('class="ring"') == 1 and page.count('class="dot"') == 2
    assert page.index("<b>CoLA</b>") < page.index("<b>WNLI</b>")


def settings_suite(folder: Path, effect: float, seeds: int = 5) -> Path:
    """Two settings with different learning rates, whose scores differ by `effect` and a random part per seed."""
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
    ("effect", "verdict"), [(-0.05, Verdict.LOWER), (-0.001, Verdict.WITHIN), (0.05, Verdict.LOWER)]
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
