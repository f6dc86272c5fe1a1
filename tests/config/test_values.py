"""Values that a template left for the user to put in are refused by name."""

import json

import pytest

from bert_glue.config.parser import parse
from bert_glue.config.values import is_placeholder
from bert_glue.errors import UsageError

BASE = {"model_name_or_path": "m", "task_name": "rte", "do_train": True, "output_dir": "out"}


@pytest.mark.parametrize(
    "text",
    [
        "<model>", "<your model here>", "REPLACE_ME", "replace-me", "CHANGEME", "FILL_IN", "YOUR_MODEL",
        "your-name/bert", "/path/to/model", "path/to/glue", "$MODEL", "${MODEL}", "$HOME/bert", "{{ model }}",
        "{model}",
        "%MODEL%",
        "...", ".../bert", "out/<run>", "/data/REPLACE_ME/mrpc", "hf_xxxxx", "<model>.csv", "runs-${SEED}", "$OUT.csv",
        "a/b-<name>/c", "***",
    ],
)  # fmt: skip
def test_placeholders(text):
    assert is_placeholder(text)


@pytest.mark.parametrize(
    "text",
    ["bert-base-cased", "google-bert/bert-base-cased", "./out", "../m", "/data/your", "yourmodel/x", "paths/to-go",
     "a<b>c", "mrpc.f1>=0.88", "run $5", "50%", "replacement", "change", "editing_me", "/", "1e-5"],
)  # fmt: skip
def test_values_that_are_none(text):
    assert not is_placeholder(text)


def test_what_exists_is_a_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "<model>").mkdir()
    assert not is_placeholder("path/to") and not is_placeholder("<model>") and is_placeholder("path/to/x")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "model_name_or_path",
            "REPLACE_ME",
            "'REPLACE_ME' is a placeholder of a template; replace it by",
        ),
        ("output_dir", "/path/to/output", "'/path/to/output' is a placeholder"),
        ("run_name", "<name>", "'<name>' is a placeholder"),
        ("token", "<your token>", "a value is a placeholder"),
        # Looking at such a path raises an OSError, each time in another place.
        ("model_name_or_path", 256 * "m", "has a name of more than 255 bytes"),
        ("resume_from_checkpoint", f"out/{128 * 'é'}", "has a name of more than 255 bytes"),
        ("dataset_name", f"{300 * 'x'}/data", "has a name of more than 255 bytes"),
    ],
)
def test_command_lines_and_files_with_values_that_name_nothing(tmp_path, name, value, says):
    line = [word for key, given in BASE.items() for word in ([f"--{key}"] if given is True else [f"--{key}", given])]
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**BASE, name: value}))
    for argv in ([*line, f"--{name}", value], [str(file)]):
        with pytest.raises(UsageError) as caught:
            parse(argv)
        (problem,) = str(caught.value).splitlines()
        assert f"{name}: " in problem and says in problem


def test_a_delimiter_is_taken_as_it_is():
    line = "--model_name_or_path m --do_train --output_dir o --train_file a.csv --text_column_delimiter <sep>"
    assert parse(line.split()).text_column_delimiter == "<sep>"
