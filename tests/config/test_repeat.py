"""run.json and --repeat: the same run again, from the record alone, to the same hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import arguments, changed, flags_of, make_model

import run_glue
from bert_glue.config.parser import parse
from bert_glue.errors import UsageError
from bert_glue.storage.files import file_hash


@pytest.fixture(autouse=True)
def _own_signals(monkeypatch):
    """A run in process would keep SIGTERM and SIGINT."""
    monkeypatch.setattr("signal.signal", lambda number, handler: None)


@pytest.fixture
def first(tmp_path):
    """A finished run with its record."""
    model = make_model(tmp_path / "model", dropout=0.1)
    args = arguments(
        tmp_path, model_name_or_path=str(model), do_eval=True, do_predict=True, max_steps=3, seed=7,
        gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    assert run_glue.main(flags_of(args)) == 0
    return args, tmp_path / "out" / "run.json"


def again(record: Path, capsys, *more: str) -> tuple[int, str]:
    code = run_glue.main(["--repeat", str(record), *more])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_same_weights_in_a_folder_of_its_own(first, tmp_path, capsys):
    args, record = first
    before = file_hash(tmp_path / "out" / "model.safetensors")
    code, said = again(record, capsys)
    assert code == 0, said
    assert f"repeat: the same weights with sha256 {before}" in said
    assert file_hash(tmp_path / "out-repeat" / "model.safetensors") == before
    assert file_hash(tmp_path / "out" / "model.safetensors") == before
    names = ("predict_results_own.txt", "train_loss.tsv")
    assert all((tmp_path / "out" / n).read_text() == (tmp_path / "out-repeat" / n).read_text() for n in names)


def test_from_another_folder_and_into_a_named_one(first, tmp_path, capsys, monkeypatch):
    """Paths of the record are relative to where the run was started."""
    args, record = first
    content = json.loads(record.read_text())
    content["working_directory"] = str(tmp_path)
    for name in ("model_name_or_path", "train_file", "validation_file", "test_file", "output_dir"):
        content["arguments"][name] = str(Path(content["arguments"][name]).relative_to(tmp_path))
    record.write_text(json.dumps(content))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, said = again(record, capsys, "--output_dir", "mine")
    assert code == 0, said
    assert (tmp_path / "elsewhere" / "mine" / "model.safetensors").is_file()


def test_a_resumed_run_is_repeated_in_one_go(tmp_path, capsys):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    args = arguments(tmp_path, **settings)
    assert run_glue.main(flags_of(args)) == 0
    (tmp_path / "out" / "checkpoint-4" / "manifest.json").unlink()
    assert run_glue.main(flags_of(changed(args, resume_from_checkpoint="auto"))) == 0
    code, said = again(tmp_path / "out" / "run.json", capsys)
    assert code == 0 and "repeat: the same weights" in said
    assert "resumed after step" not in said.rsplit("device:", 1)[-1]


def test_a_run_resumed_with_other_settings_cannot_be_repeated(tmp_path, capsys):
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    assert run_glue.main(flags_of(args)) == 0
    other = changed(
        args, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"), learning_rate=1e-3,
        output_dir=str(tmp_path / "other"),
    )  # fmt: skip
    assert run_glue.main(flags_of(other)) == 0
    code, said = again(tmp_path / "other" / "run.json", capsys)
    assert code == 2 and "resumed with other settings, after step 2: --learning_rate 0.001 (was 0.005)" in said


def test_other_rows_and_other_weights_are_refused_before_training(first, tmp_path, capsys):
    args, record = first
    path = Path(args.train_file)
    rows = path.read_text()
    path.write_text(rows.replace("dog", "cat"))
    code, said = again(record, capsys)
    assert code == 3 and "the rows of train are not those" in said
    path.write_text(rows)
    make_model(tmp_path / "model", dropout=0.1, changes={"bert.pooler.dense.bias": make_bias()})
    code, said = again(record, capsys)
    assert code == 4 and "model.safetensors" in said


def make_bias():
    import numpy as np

    return np.full(16, 0.5, np.float32)


def test_another_machine_is_named_and_another_outcome_is_an_error(first, tmp_path, capsys):
    _, record = first
    content = json.loads(record.read_text())
    content["packages"]["torch"], content["weights_sha256"] = "1.0.0", "0" * 64
    record.write_text(json.dumps(content))
    code, said = again(record, capsys)
    assert code == 4
    assert "note: repeated with torch" in said and "instead of 1.0.0:" in said
    assert "the weights differ from the first run's" in said


def test_an_evaluation_is_repeated_too(first, tmp_path, capsys):
    args, _ = first
    only = changed(args, do_train=False, model_name_or_path=args.output_dir, output_dir=str(tmp_path / "evaluated"))
    assert run_glue.main(flags_of(only)) == 0
    code, said = again(tmp_path / "evaluated" / "run.json", capsys)
    assert code == 0 and "repeat: the same scores" in said
    content = json.loads((tmp_path / "evaluated" / "run.json").read_text())
    content["scores"]["eval_accuracy"] = 2.0
    (tmp_path / "evaluated" / "run.json").write_text(json.dumps(content))
    code, said = again(tmp_path / "evaluated" / "run.json", capsys)
    assert code == 4 and "scores differ" in said and "(was 2.0)" in said


def test_a_sample_run_is_repeated_with_its_recipe(tmp_path, capsys):
    args = arguments(
        tmp_path, sample=True, task_name="cola", do_eval=True, max_train_samples=64, max_eval_samples=20, max_steps=3
    )  # fmt: skip
    assert run_glue.main(flags_of(args)) == 0
    code, said = again(tmp_path / "out" / "run.json", capsys)
    assert code == 0 and "repeat: the same weights" in said
    assert json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]["model_name_or_path"] is None


NOT_RECORDS = {
    "{}": "it has no 'arguments'",
    "[]": "it is not a JSON object",
    "{": "it is not JSON",
    '{"arguments": {"do_train": true}}': "it has no 'data'",
    '{"arguments": [], "data": {}}': "its 'arguments' is '\\[\\]'",
}


@pytest.mark.parametrize("text", NOT_RECORDS)
def test_what_is_no_record_is_a_usage_error(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=NOT_RECORDS[text]):
        parse(["--repeat", str(path)])
    with pytest.raises(UsageError, match="No such file"):
        parse(["--repeat", str(tmp_path / "absent.json")])
    with pytest.raises(UsageError, match="needs a value"):
        parse(["--repeat"])


def test_a_config_and_a_record_are_two_sets_of_settings(first, tmp_path):
    _, record = first
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="two sets of settings"):
        parse([str(tmp_path / "config.json"), "--repeat", str(record)])
    args = parse(["--repeat", str(record), "--seed", "9"])
    assert args.seed == 9 and args.max_steps == 3 and args.output_dir.endswith("out-repeat")


@pytest.mark.parametrize(
    ("name", "value"),
    [("changes", True), ("changes", "none"), ("working_directory", None), ("working_directory", 7), ("scores", []),
     ("weights_sha256", 1), ("packages", None), ("model_sha256", "0"), ("data", {"sha256": None})],
)  # fmt: skip
def test_a_field_of_another_kind_is_named(tmp_path, name, value):
    arguments = {"do_train": False, "output_dir": "out", "task_name": "mrpc"}
    record = {"arguments": arguments, "working_directory": str(tmp_path), "scores": {}, "weights_sha256": None}
    record |= {"data": {"sha256": {}}, "changes": [], name: value}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=f"not the run.json of a run: its '{'sha256' if name == 'data' else name}'"):
        parse(["--repeat", str(tmp_path / "run.json")])


@pytest.mark.parametrize("value", ["a" * 5000, "nul\0byte", "half \ud800"])
def test_a_path_that_no_file_can_have_is_no_traceback(tmp_path, value):
    arguments = {"do_train": False, "output_dir": "out", "task_name": "mrpc", "data_path": value}
    record = {"arguments": arguments, "working_directory": str(tmp_path), "scores": {}, "weights_sha256": None}
    (tmp_path / "run.json").write_text(json.dumps({**record, "data": {"sha256": {}}, "changes": []}))
    with pytest.raises(UsageError):
        parse(["--repeat", str(tmp_path / "run.json")])
