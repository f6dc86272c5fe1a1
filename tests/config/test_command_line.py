"""Commands other than run_glue.py answer unknown flags and placeholders as run_glue.py does."""

import argparse
from importlib import import_module
from pathlib import Path

import pytest

from bert_glue.__main__ import COMMANDS
from bert_glue.config.command_line import CommandParser
from bert_glue.config.suggestions import suggested_option

OTHERS = [name for name, command in COMMANDS.items() if command.module != "run_glue"]


def refusal(command, capsys, *words):
    """The lines of a usage error, which ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        import_module(COMMANDS[command].module).main(list(words))
    found = capsys.readouterr()
    assert ended.value.code == 2 and not found.out
    lines = found.err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


@pytest.mark.parametrize(
    ("command", "name", "hint"),
    [
        ("predict", "--modle", "Did you mean --model?"),
        ("predict", "--model_name_or_path", "Did you mean --model?"),
        ("predict", "--batch", "Did you mean --per_device_eval_batch_size?"),
        ("predict", "--max_len", "Did you mean --max_seq_length?"),
        ("predict", "--text_column", "Did you mean --text_column_names?"),
        ("predict", "--save_dir", "Did you mean --output?"),
        ("predict", "--lr", "--learning_rate is a flag of run_glue.py, not of this command."),
        ("predict", "--use_lazy_mode", "--help lists all flags."),
        ("predict", "--loss", "--help lists all flags."),
        ("sweep", "--lr", "Did you mean --learning_rates?"),
        ("sweep", "--learning-rate", "Did you mean --learning_rates?"),
        ("sweep", "--random_state", "Did you mean --seeds?"),
        ("sweep", "--train_csv", "Did you mean --train_file?"),
        ("sweep", "--batch", "--per_device_train_batch_size is a flag of run_glue.py; such flags go behind --."),
        ("sweep", "--bf16", "--bf16 is a flag of run_glue.py; such flags go behind --."),
        ("export", "--model", "RUN is given without a flag."),
        ("export", "--bs", "Did you mean --batch?"),
        ("soup", "--outdir", "Did you mean --output_dir?"),
        ("report", "--out", "Did you mean --output?"),
        ("submit", "--output_folder", "Did you mean --output?"),
        ("doctor", "--gpu", "Did you mean --device?"),
        ("check", "--baselin", "Did you mean --baseline?"),
    ],
)
def test_a_suggestion_means_what_was_typed(command, name, hint, capsys):
    assert refusal(command, capsys, name, "1") == [f"{name}: unknown flag. {hint}"]


@pytest.mark.parametrize("command", OTHERS)
def test_no_command_takes_a_part_of_a_name_or_one_dash(command, capsys):
    assert refusal(command, capsys, "--use_lazy_mode") == ["--use_lazy_mode: unknown flag. --help lists all flags."]
    assert refusal(command, capsys, "-lr", "1") == ["unexpected '-lr': flags begin with --"]


def test_all_unknown_flags_are_one_error(capsys):
    lines = refusal("predict", capsys, "--modle", "m", "--inptu=a.csv", "--epochs", "3")
    assert [line.partition(":")[0] for line in lines] == ["--modle", "--inptu", "--epochs"]


@pytest.mark.parametrize(
    ("command", "words", "begin"),
    [
        ("predict", ["--model", "<your_model>", "--input", "a.csv", "--output", "b.csv"], "--model: '<your_model>'"),
        ("predict", ["--model", "m", "--input", "path/to/a.csv", "--output", "b.csv"], "--input: 'path/to/a.csv'"),
        ("predict", ["--model", "m", "--input", "a.csv", "--output", "$OUT.csv"], "--output: '$OUT.csv'"),
        ("sweep", ["--model", "${MODEL}", "--sample"], "--model: '${MODEL}'"),
        ("sweep", ["--sample", "--output_dir", "runs/<name>"], "--output_dir: 'runs/<name>'"),
        ("soup", ["a", "{{ run }}", "--output_dir", "c"], "RUN: '{{ run }}'"),
        ("report", ["path/to/run"], "FOLDER: 'path/to/run'"),
        ("submit", ["runs/$TASK"], "RUN: 'runs/$TASK'"),
        ("export", ["YOUR_RUN", "--onnx"], "RUN: 'YOUR_RUN'"),
        ("doctor", ["--device", "<device>"], "--device: '<device>'"),
        ("check", ["run", "--write", "%FILE%"], "--write: '%FILE%'"),
    ],
)
def test_placeholders_are_refused(command, words, begin, capsys):
    (line,) = refusal(command, capsys, *words)
    assert line.startswith(begin + " is a placeholder of a template; replace it by: ")


def test_what_exists_and_what_is_text_is_no_placeholder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("<run>").mkdir()
    parser = CommandParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--text_column_names", nargs="+")
    parser.add_argument("--label_delimiter")
    words = ["<run>", "--text-column-names", "<text>", "...", "--label_delimiter=<sep>"]
    assert parser.parse_args(words) == argparse.Namespace(
        run=Path("<run>"), text_column_names=["<text>", "..."], label_delimiter="<sep>"
    )


def test_values_that_begin_with_a_dash_are_argparse_s_to_judge():
    parser = CommandParser()
    parser.add_argument("--doc_stride", type=int)
    parser.add_argument("--input")
    assert vars(parser.parse_args(["--doc_stride", "-1", "--input", "-"])) == {"doc_stride": -1, "input": "-"}


def test_no_command_suggests_a_flag_it_does_not_have():
    options, same = ["output", "partial", "allow_sample", "help"], {"output_dir": "output"}
    found = {suggested_option(name, options, same) for name in ("lr", "epochs", "train_file", "fp16", "resume", "seed")}
    assert found == {""}
    assert suggested_option("allow_smaple", options, same) == "allow_sample"
