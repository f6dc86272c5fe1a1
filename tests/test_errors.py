"""What a command does with a user's mistake: lines, the exit code, and the error as data for who started it."""

from __future__ import annotations

import errno
import json
import os

import pytest

from bert_glue.errors import ERROR_FILE, DataError, MachineError, exit_code_of, print_lines, printable


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


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 4), (errno.ENAMETOOLONG, 4), (errno.EMFILE, 4), (errno.ENOSPC, 6), (errno.EROFS, 6)],
)
def test_what_the_file_system_refuses_anywhere_is_a_line(capsys, number, code):
    reason = os.strerror(number)
    assert exit_code_of(fail_with(OSError(number, reason, "/closed/file"))) == code
    assert capsys.readouterr().err == f"error: /closed/file: {reason}\n"
    with pytest.raises(OSError):  # no path, so not the user's file
        exit_code_of(fail_with(OSError(number, reason)))
    with pytest.raises(FileNotFoundError):
        exit_code_of(fail_with(FileNotFoundError(errno.ENOENT, "gone", "/ours")))


def test_a_name_that_no_file_can_have_is_a_line(tmp_path, capsys):
    import run_glue
    from bert_glue import check, soup
    from bert_glue.predict import __main__ as predict
    from bert_glue.report import __main__ as report

    name = str(tmp_path / ("x" * 300))
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence1,label\na dog runs,yes\na cat sleeps,no\n")
    needed = ["--do_train", "--output_dir", str(tmp_path / "out")]
    for main, argv in (
        (run_glue.main, ["--model_name_or_path", name, "--train_file", str(rows), *needed]),
        (run_glue.main, ["--model_name_or_path", str(tmp_path), "--task_name", "mrpc", "--data_path", name, *needed]),
        (run_glue.main, ["--model_name_or_path", str(tmp_path), "--train_file", f"{name}.csv", *needed]),
        (predict.main, ["--model", name, "--input", "a.csv", "--output", "b.csv"]),
        (report.main, [name]),
        (check.main, [name]),
        (soup.main, [name, name, "--output_dir", str(tmp_path / "soup")]),
    ):
        assert main(argv) in (2, 3, 4, 6), argv
        errors = capsys.readouterr().err
        assert "error: " in errors and "xxx" in errors, argv


HOSTILE = [
    "\x1b]0;title\x07", "\x1b[2J", "\u202egnp.exe", "\x9b31m", "a\rerror: none", "\u2028x", "\x85", "\ud800", "\u2066",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_names_of_other_people_do_not_steer_a_terminal(text, capsys):
    for shown in (str(DataError(f"a.csv:2: no column {text}")), printable(text)):
        assert shown.isprintable()
    print_lines(f"note: {text}", "second")
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


def test_what_can_be_read_is_shown_as_it_is(capsys):
    for text in ("\u4f60\u597d\u3000\u4e16\u754c", "na\u00efve \U0001f600", "a\nb", ""):
        assert printable(text) == text
    assert printable("a\tb\x00") == "a\\tb\\x00"
