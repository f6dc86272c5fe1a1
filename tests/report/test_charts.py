"""Axes, smoothing and thinning of the charts."""

from __future__ import annotations

import pytest

from bert_glue.report import charts


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
