"""Files are complete or absent, never written through a foreign link, and their cells and labels have one line."""

from __future__ import annotations

import os

import pytest

from bert_glue.storage import files


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "README.md").symlink_to(victim)
    (tmp_path / f".README.md.{os.getpid()}").symlink_to(victim)
    files.write_whole(tmp_path / "README.md", "ours")
    assert victim.read_text() == "precious"
    assert (tmp_path / "README.md").read_text() == "ours" and not (tmp_path / "README.md").is_symlink()


@pytest.mark.parametrize("kind", ["symlink", "hard link", "pipe", "link to nothing"])
def test_a_file_to_append_to_is_a_file_of_its_own(tmp_path, kind):
    victim, path = tmp_path / "victim", tmp_path / ".lock"
    victim.write_text("precious")
    {
        "symlink": lambda: path.symlink_to(victim),
        "hard link": lambda: path.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(path),
        "link to nothing": lambda: path.symlink_to(tmp_path / "nothing"),
    }[kind]()
    with pytest.raises(OSError, match="link"):
        files.open_own(path)
    assert victim.read_text() == "precious" and not (tmp_path / "nothing").exists()


def test_a_file_to_append_to_is_made_and_kept(tmp_path):
    for word in (b"a", b"b"):
        with files.open_own(tmp_path / "log") as file:
            file.write(word)
    assert (tmp_path / "log").read_bytes() == b"ab"


def test_a_folder_of_ours_is_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="it is a link"):
        files.make_own_folder(tmp_path / "adapter")
    files.make_own_folder(tmp_path / "other")
    files.make_own_folder(tmp_path / "other")


@pytest.mark.parametrize("text", ["=1+1", "+cmd|x", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1"])
def test_what_a_spreadsheet_would_run_gets_an_apostrophe(text):
    assert files.without_formula(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a=b", "-0.5", "+1e-3", "-inf", "'=1", " =1"])
def test_texts_and_numbers_stay(text):
    assert files.without_formula(text) == text


def test_labels_without_quoting_are_one_line_each():
    assert files.one_line("a\tb\n---\r\\") == "a\\tb\\n---\\r\\\\"
    assert len(f"x{files.one_line(''.join(map(chr, range(0x3000))))}x".splitlines()) == 1


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path):
    gone = 4_000_000  # above the kernel's largest process id
    left = [f".eval_results.json.{gone}", f".report.html.{gone}", f".predict_results_mrpc.txt.{gone}"]
    kept = [f".eval_results.json.{os.getpid()}", ".lock", ".p.csv.partial", f"notes.json.{gone}", f".mine.{gone}"]
    for name in (*left, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / f".run.json.{gone}").symlink_to(tmp_path / ".lock")
    files.remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, f".run.json.{gone}"])


def test_a_path_that_is_no_text_is_escaped(tmp_path):
    path = os.fsdecode(b"caf\xe9")
    files.write_json(tmp_path / "run.json", {"output_dir": path})
    assert files.json_object(tmp_path / "run.json") == {"output_dir": path}


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "run.json"
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    for read in (files.json_object, files.file_hash, files.read_plain_text):
        with pytest.raises(OSError, match="pipe|Is a directory"):
            read(path)


def test_a_text_has_a_largest_size(tmp_path):
    (tmp_path / "a").write_text("12345")
    assert files.read_plain_text(tmp_path / "a", 5) == "12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        files.read_plain_text(tmp_path / "a", 4)
