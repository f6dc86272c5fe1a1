"""Files of a run or model folder with any JSON in them: used, or refused in plain lines; never a traceback."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from fuzzing import EXAMPLES, hypothesis_test
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_run import arguments, fit

from bert_glue import check, soup, submission
from bert_glue.config.parser import main_parse
from bert_glue.errors import CheckpointError, UserError, exit_code_of
from bert_glue.launch import results
from bert_glue.model.bounds import check_config
from bert_glue.model.folder import task_of_model
from bert_glue.pipeline.run import run
from bert_glue.predict import __main__ as predict
from bert_glue.report import __main__ as report_command
from bert_glue.result_keys import COLLAPSED
from bert_glue.storage import checkpoint
from bert_glue.storage.files import file_hash
from bert_glue.training.checkpoint_contents import read_state

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.sampled_from([2**63, -(10**30), 10**9, 1e999, float("nan")]),
    st.floats(), st.text(max_size=6), st.sampled_from(["", "0", "../x", "/etc/passwd", "\ud800", "<b>", "a\nb"]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
ODD = st.sampled_from(["", "[" * 100_000, '{"a": 1', "\0", "null", "{}", "[]", '"x"', '{"step": 1}{'])


def changed_somewhere(draw, value, depth: int = 0):
    """The value with a field changed, dropped or put in, at any depth."""
    if depth < 4 and value and isinstance(value, dict | list) and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if draw(st.integers(0, 5)) == 0:
            del copy[key]
        else:
            copy[key] = changed_somewhere(draw, copy[key], depth + 1)
        return copy
    return draw(JSON)


@st.composite
def contents(draw, value) -> str:
    """The text of a JSON file: one that is right, with one to three changes, or no JSON at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ODD)
    for _ in range(draw(st.integers(1, 3))):
        value = changed_somewhere(draw, value)
    return json.dumps(value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output folder of a finished run with all its files."""
    args = arguments(
        tmp_path_factory.mktemp("finished"), sample=True, task_name="mrpc", train_file=None, validation_file=None,
        test_file=None, max_seq_length=64, max_train_samples=300, max_eval_samples=80, learning_rate=5e-3, max_steps=40,
        max_predict_samples=5, do_eval=True, do_predict=True, save_strategy="steps", save_steps=20,
        model_name_or_path=None,
    )  # fmt: skip
    assert run(args) == 0
    folder = Path(args.output_dir)
    scores = json.loads((folder / "all_results.json").read_text())
    learned = {name: value for name, value in scores.items() if COLLAPSED not in name}  # else a baseline refuses it
    (folder / "all_results.json").write_text(json.dumps(learned))
    (folder / "rows.csv").write_text("sentence1,sentence2\na dog runs,a cat sleeps\n", encoding="utf-8")
    return folder


@EXAMPLES
def test_a_model_config(finished, tmp_path, report, examples):
    found: Counter = Counter()
    good = json.loads((finished / "config.json").read_text())

    @hypothesis_test(examples, contents(good))
    def _(text: str) -> None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            task, _ = task_of_model(tmp_path)
            check_config(json.loads(text), tmp_path / "config.json")
            assert all(isinstance(label, str) for label in task.labels)
            found["accepted"] += 1
        except UserError as error:
            assert str(error).count("\n") == 0
            found[f"exit code {error.exit_code}"] += 1

    report(f"{found.total()} config.json: {dict(found)}")


@EXAMPLES
def test_a_manifest(finished, tmp_path, report, examples):
    found: Counter = Counter()
    folder = tmp_path / "checkpoint-20"
    shutil.copytree(finished / "checkpoint-20", folder)
    before = sorted(path.name for path in folder.iterdir())
    good = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "victim").write_text("precious")

    @hypothesis_test(examples, contents(good), st.booleans())
    def _(text: str, fits: bool) -> None:
        if fits:  # as whoever can write the file can make it
            with suppress(ValueError, LookupError, TypeError, RecursionError):
                content = json.loads(text)
                text = checkpoint._manifest_text(content["files"], content["written"])
        (folder / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        reason = checkpoint.verify(folder)
        assert isinstance(reason, str) and len(reason) < 500
        assert checkpoint.newest_sound(tmp_path)[0] in (None, folder)
        checkpoint.finish_interrupted(tmp_path)
        found["sound" if not reason else "rejected"] += 1

    assert sorted(path.name for path in folder.iterdir()) == before
    assert (tmp_path / "victim").read_text() == "precious"
    report(f"{found.total()} manifests: {dict(found)}")


@EXAMPLES
def test_a_state(finished, tmp_path, report, examples):
    found: Counter = Counter()
    good = json.loads((finished / "checkpoint-20" / "trainer_state.json").read_text())

    @hypothesis_test(examples, contents(good))
    def _(text: str) -> None:
        (tmp_path / "trainer_state.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            state = read_state(tmp_path)
            assert 0 <= state["best_step"] <= state["step"]
            found["accepted"] += 1
        except ValueError:
            found["refused"] += 1

    report(f"{found.total()} trainer_state.json: {dict(found)}")


COMMANDS = {
    "report": lambda folder, out: report_command.main([str(folder), "--output", str(out / "report.html")]),
    "suite": lambda folder, out: report_command.main([str(folder), str(folder), "--output", str(out / "suite.html")]),
    "check": lambda folder, out: check.main(["--write", str(out / "baseline.json"), str(folder)]),
    "submission": lambda folder, out: submission.main(
        [str(folder), "--output", str(out / "s.zip"), "--partial", "--allow_sample"]
    ),
    "repeat": lambda folder, out: exit_code_of(
        lambda: main_parse(["--repeat", str(folder / "run.json"), "--output_dir", str(out / "again")]) is None
    ),
    "launcher": lambda folder, out: results.main(["report", str(folder), "--case", "perf"]),
    "predict": lambda folder, out: predict.main(
        ["--model", str(folder), "--input", str(folder / "rows.csv"), "--output", str(out / "rows.jsonl")]
    ),
    "soup": lambda folder, out: soup.main(
        [str(folder), str(folder.parent / "other"), "--output_dir", str(out / "soup")]
    ),
}
FILES = ("all_results.json", "run.json", "trainer_state.json", "analysis.json", "config.json", "bert_glue.json")


@EXAMPLES
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_folder(finished, tmp_path, report, capsys, command, examples):
    found: Counter = Counter()
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.copytree(finished, tmp_path / "other")
    weights = load_file(finished / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, tmp_path / "other" / "model.safetensors")
    whole = {name: (folder / name).read_text(encoding="utf-8") for name in FILES}
    damaged = st.sampled_from(FILES).flatmap(lambda name: st.tuples(st.just(name), contents(json.loads(whole[name]))))

    @hypothesis_test(examples, damaged)
    def _(change: tuple[str, str]) -> None:
        name, text = change
        (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            code = COMMANDS[command](folder, out)
        except SystemExit as error:
            code = error.code
        finally:
            (folder / name).write_text(whole[name], encoding="utf-8")
        assert code in (0, 2, 3, 4, 5, 6, 8, 9), (command, name, code)
        found[f"exit code {code}"] += 1

    capsys.readouterr()
    report(f"{found.total()} run folders for {command}: {dict(found)}")


@EXAMPLES
def test_a_baseline(finished, tmp_path, report, capsys, examples):
    found: Counter = Counter()
    written, file = tmp_path / "written.json", tmp_path / "baseline.json"
    assert check.main([str(finished), "--write", str(written)]) == 0

    @hypothesis_test(examples, contents(json.loads(written.read_text())), st.booleans())
    def _(text: str, writes: bool) -> None:
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        code = check.main([str(finished), "--write" if writes else "--baseline", str(file)])
        assert code in (0, 2, 8, 9)
        found[f"exit code {code}"] += 1

    capsys.readouterr()
    report(f"{found.total()} baselines: {dict(found)}")


def test_a_resealed_checkpoint_with_other_tensors_is_refused(tmp_path):
    """Whoever can write the manifest can make its hashes fit: what it holds is compared all the same."""
    import torch

    first = fit(arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2))
    folder = first.output_dir / "checkpoint-2"
    given_tensors = load_file(folder / "optimizer.safetensors")
    for name, value in given_tensors.items():
        for other in (torch.zeros(7, dtype=value.dtype), value.double(), None):
            changed = {**given_tensors, name: other} if other is not None else dict(given_tensors)
            if other is None:
                del changed[name]
            save_file(changed, folder / "optimizer.safetensors")
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
                for path in sorted(folder.iterdir())
                if path.name != "manifest.json"
            }
            (folder / "manifest.json").write_text(checkpoint._manifest_text(files, 1.0), encoding="utf-8")
            assert checkpoint.verify(folder) == ""
            again = arguments(tmp_path, max_steps=4, resume_from_checkpoint=str(folder))
            with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
                fit(again)
