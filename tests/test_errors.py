"""What a command does with a user's mistake: lines, the exit code, and the error as data for who started it."""

from __future__ import annotations

import json

import pytest

from bert_glue.errors import ERROR_FILE, DataError, MachineError, exit_code_of


def fail_with(error: Exception):
    def action() -> int:
        raise error

    return action


def test_an_error_is_its_lines_and_its_code(capsys, monkeypatch):
    monkeypatch.delenv(ERROR_FILE, raising=False)
    assert exit_code_of(fail_with(DataError("a.csv:2: no label\na.csv:3: no label"))) == 3
    assert capsys.readouterr().err == "error: a.csv:2: no label\nerror: a.csv:3: no label\n"


def test_a_fix_stands_behind_what_is_wrong_and_is_a_field():
    error = MachineError("npu:3 is not here; there are 2", "choose one below 2", ("here: torch 2.13",))
    assert (error.what, error.fix) == ("npu:3 is not here; there are 2", "choose one below 2")
    assert str(error) == "npu:3 is not here; there are 2; choose one below 2\nhere: torch 2.13"


def test_the_error_is_handed_over_as_data(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(file))
    assert exit_code_of(lambda: 0) == 0 and not file.exists()
    assert exit_code_of(fail_with(DataError("a.csv:2: no label"))) == 3
    assert json.loads(file.read_text()) == {"exit_code": 3, "error": "a.csv:2: no label"}
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "absent" / "error.json"))
    assert exit_code_of(fail_with(DataError("x"))) == 3  # a file that cannot be written changes nothing


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_a_fault_of_ours_is_not_dressed_up(kind):
    with pytest.raises(kind):
        exit_code_of(fail_with(kind("bug")))
