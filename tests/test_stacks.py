"""The table of other versions: what its rows say, and that rows which were not measured again stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import stacks


def row(name: str, difference: float | None = 0.0, **areas: tuple[int, int, int]) -> dict:
    counts = {
        area.replace("_", " "): dict(zip(("passed", "failed", "skipped"), numbers, strict=True))
        for area, numbers in areas.items()
    }
    versions = {"python": "3.10.1", **dict.fromkeys(stacks.SHOWN, "1.2")}
    return {"stack": name, "versions": versions, "loss_difference": difference, "areas": counts}


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "stacks.md"
    file.write_text(f"before\n{stacks.BEGIN}{stacks.END}after\n", encoding="utf-8")
    monkeypatch.setattr(stacks, "PAGE", file)
    return file


def test_the_page_keeps_rows_of_other_stacks(page: Path) -> None:
    stacks.write_page([row("oldest", resume=(2, 0, 0))])
    stacks.write_page([row("newest", 1e-3, resume=(1, 1, 0), two_ranks=(1, 0, 3))])
    stacks.write_page([row("oldest", None)])
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and len(lines) == 2 + 2 + 4
    oldest, newest = (next(line for line in lines if line.startswith(f"| {name} ")) for name in ("oldest", "newest"))
    assert "| do not run | not run |" in oldest
    assert "| differ by 1.0e-03 | 1 passed, 1 failed | not run |" in newest and "| 1 passed, 3 skipped |" in newest


@pytest.mark.parametrize(
    ("measured", "is_sound"),
    [
        (row("x", resume=(2, 0, 0)), True),
        (row("x", resume=(2, 0, 1), hub=(1, 1, 0)), False),
        (row("x", resume=(0, 0, 4)), True),
        (row("x", resume=(0, 0, 0)), False),
        (row("x", None, resume=(2, 0, 0)), False),
        (row("x", 1e-4, resume=(2, 0, 0)), False),
    ],
)
def test_what_failed_or_did_not_run_is_not_sound(measured: dict, is_sound: bool) -> None:
    assert stacks.is_sound(measured) is is_sound


def test_every_area_names_tests_that_exist() -> None:
    for names in stacks.AREAS.values():
        for name in names:
            file, _, test = name.partition("::")
            assert f"def {test}(" in (stacks.ROOT / file).read_text(encoding="utf-8") if test else "def test_"
