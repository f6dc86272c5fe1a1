"""Broken command lines and config files: every problem in plain lines and exit code 2, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fuzzing import EXAMPLES, hypothesis_test
from hypothesis import strategies as st
from tiny_run import REPOSITORY

from bert_glue.config.arguments import FLAGS, Arguments
from bert_glue.config.legacy import LEGACY_FLAGS
from bert_glue.config.parser import main_parse
from bert_glue.errors import UsageError

NAMES = st.one_of(
    st.sampled_from(list(FLAGS)),
    st.sampled_from(list(LEGACY_FLAGS)),
    st.sampled_from(list(FLAGS)).map(lambda name: name[:-1]),
    st.sampled_from(list(FLAGS)).map(lambda name: f"no_{name}"),
    st.text(max_size=8),
)
VALUES = st.one_of(
    st.sampled_from([
        "", "0", "-1", "1e999", "nan", "inf", "9" * 5000, "true", "None", "none", "a,b", "mrpc", "mnli", "ax", "O2",
        "dynamic", "cpu", "npu:x", "x.csv", "x.exe", "\u0663", "1_000", "0x10", "--", "-fp16", "\ud800", "a\nb", "no",
        "steps", "epoch", "accuracy", "auto",
    ]),
    st.text(max_size=10),
    st.integers(-5, 2**70).map(str),
    st.floats().map(str),
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def _words(draw) -> list[str]:
    words = draw(
        st.sampled_from([[], ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "o", "--do_train"]])
    )
    for _ in range(draw(st.integers(0, 6))):
        flag, value = f"--{draw(NAMES)}", draw(VALUES)
        words = [*words, *draw(st.sampled_from([[flag], [flag, value], [f"{flag}={value}"], [value]]))]
    return words


@st.composite
def _config(draw) -> tuple[str, bytes]:
    """A config file's suffix and content: flags with values of any kind, cut or not, in any encoding."""
    suffix = draw(st.sampled_from([".json", ".yaml", ".yml"]))
    settings_ = draw(st.dictionaries(NAMES, JSON, max_size=6) | JSON)
    text = json.dumps(settings_)
    if suffix != ".json" and isinstance(settings_, dict) and draw(st.booleans()):
        text = "\n".join(f"{name}: {value}" for name, value in settings_.items())
    content = text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])), "replace")
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        content = draw(
            st.sampled_from([content[:at], content[:at] + b"\0" + content[at:], content + b"\xff", b"[" * 1200])
        )
    return suffix, content


def outcome(words: list[str]) -> str:
    """What the command line became; anything but settings, help or a usage error fails the test."""
    try:
        args = main_parse(words)
    except UsageError as error:
        assert error.exit_code == 2 and str(error)
        for line in str(error).splitlines():
            assert len(line) < 2500 and line.isprintable(), line
        return "refused"
    assert args is None or isinstance(args, Arguments)
    return "accepted"


@EXAMPLES
def test_command_lines(report, capsys, examples):
    found: Counter = Counter()

    @hypothesis_test(examples, _words())
    def _(words: list[str]) -> None:
        found[outcome(words)] += 1

    capsys.readouterr()
    assert found["refused"] > examples // 2
    report(f"{found.total()} command lines: {dict(found)}")


@EXAMPLES
def test_config_files(tmp_path, report, capsys, examples):
    found: Counter = Counter()

    @hypothesis_test(examples, _config(), _words())
    def _(config: tuple[str, bytes], words: list[str]) -> None:
        path = tmp_path / f"config{config[0]}"
        path.write_bytes(config[1])
        found[outcome([str(path), *words])] += 1
        repeated = tmp_path / "run.json"
        repeated.write_bytes(config[1])
        found[outcome(["--repeat", str(repeated)])] += 1

    capsys.readouterr()
    assert found["refused"] > examples
    report(f"{found.total() // 2} config files, each as a run.json too: {dict(found)}")


BROKEN = {
    "bytes that are no text": [b"--seed", b"\xff\xfe"],
    "a config that is a folder": ["."],
    "a config that is cut": ["{cut}", "--do_train"],
    "nothing": [],
    "a flag twice as wrong": ["--sede", "1", "--learning_rate", "x" * 3000],
}


@pytest.mark.parametrize("case", BROKEN)
def test_real_processes(tmp_path, case):
    (tmp_path / "cut.json").write_text('{"seed": 4')
    words = [str(tmp_path / "cut.json") if word == "{cut}" else word for word in BROKEN[case]]
    done = subprocess.run([sys.executable, "run_glue.py", *words], cwd=REPOSITORY, capture_output=True, timeout=60)
    errors = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 2, errors
    assert "Traceback" not in errors and all(line.startswith("error: ") for line in errors.splitlines())


def test_all_problems_of_a_config_are_said_together(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"seed": "x", "sede": 1, "learning_rate": -1}')
    with pytest.raises(UsageError) as caught:
        main_parse([str(path)])
    assert len(str(caught.value).splitlines()) >= 3
    assert all(Path(path).name in line for line in str(caught.value).splitlines()[:3])
