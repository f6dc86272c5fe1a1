"""Flags, their checks and the command line: what is accepted, what is refused, and the messages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_glue.config.arguments import FLAGS, Arguments
from bert_glue.config.help import COMMON, topics
from bert_glue.config.legacy import LEGACY_FLAGS
from bert_glue.config.metric_checks import metric_names
from bert_glue.config.parser import as_config, main_parse, parse
from bert_glue.config.values import in_range
from bert_glue.errors import UsageError
from bert_glue.tasks import TASKS, TRAINABLE

FROZEN = Path(__file__).parents[1] / "frozen_flags.json"
ROOT = Path(__file__).parents[2]
BASE = ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "out", "--do_train"]


def problems(*extra: str, base: list[str] = BASE) -> list[str]:
    """The lines of the error that the command line ends in."""
    with pytest.raises(UsageError) as caught:
        parse([*base, *extra])
    return str(caught.value).splitlines()


def test_flag_set_is_frozen():
    """A flag may be added, with its line here; a type or default never changes by accident."""
    found = {
        name: {"type": flag.kind + (" | None" if flag.optional else ""), "default": flag.default}
        for name, flag in FLAGS.items()
    }
    assert found == json.loads(FROZEN.read_text(encoding="utf-8"))


def test_every_flag_describes_itself():
    for name, flag in FLAGS.items():
        assert flag.kind in ("str", "int", "float", "bool"), name
        assert flag.text and flag.group, name
        assert flag.optional == (flag.default is None), name
        if flag.kind in ("int", "float"):
            assert flag.range, name
            assert flag.default is None or in_range(flag.default, flag.range), name
        if flag.choices:
            assert flag.default in (None, *flag.choices), name
    assert not set(FLAGS) & set(LEGACY_FLAGS)


def test_defaults_and_types():
    args = parse(BASE)
    assert args == Arguments(model_name_or_path="m", task_name="mrpc", output_dir="out", do_train=True)
    args = parse([*BASE, "--num_train_epochs", "2", "--learning_rate=2e-5", "--max_steps", "1e3"])
    assert (args.num_train_epochs, args.learning_rate, args.max_steps) == (2.0, 2e-5, 1000)
    assert isinstance(args.max_steps, int) and isinstance(args.num_train_epochs, float)
    assert parse([*BASE, "--max_steps", "-1"]).max_steps == -1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--fp16"], True),
        (["--fp16", "true"], True),
        (["--fp16=YES"], True),
        (["--fp16", "1"], True),
        (["--fp16", "no"], False),
        (["--fp16=0"], False),
        (["--no_fp16"], False),
        (["--no-fp16"], False),
        (["--fp16", "--do_eval"], True),
    ],
)
def test_spellings_of_switches(words, expected):
    assert parse([*BASE, *words]).fp16 is expected


def test_dashes_in_flag_names_and_lists():
    args = parse([*BASE, "--max-seq-length", "64", "--report_to", "wandb", "tensorboard", "--tf32", "false"])
    assert (args.max_seq_length, args.report_to, args.tf32) == (64, "wandb,tensorboard", False)


def test_large_seed_is_exact_and_none_leaves_open():
    assert parse([*BASE, "--seed", "4294967295"]).seed == 4294967295
    assert parse([*BASE, "--save_total_limit", "3", "--save_total_limit", "none"]).save_total_limit is None


def test_repeated_flag_last_wins_with_notice():
    args = parse([*BASE, "--seed", "1", "--seed", "2"])
    assert args.seed == 2
    assert args.notices == ("--seed: --seed is given twice; the last value counts",)


def test_all_problems_at_once():
    line = "--lerning_rate 1 --seed x --optim adamw_trch --fp16 --bf16 --fp16_opt_level=O4"
    found = problems(*line.split())
    assert found[0] == "--lerning_rate: unknown flag. Did you mean --learning_rate?"
    assert found[1] == "--seed: 'x' is not a whole number; accepted: [0, 4294967295]"
    assert "Did you mean adamw_torch?" in found[2] and "Choices: adamw_torch, " in found[2]
    assert found[3].startswith("--fp16_opt_level: unknown value 'O4'")
    assert found[4] == "--fp16 and --bf16 are two precisions; give only one"
    assert len(found) == 5


def test_empty_command_line_names_all_that_is_missing():
    found = problems(base=[])
    assert [line.split(":")[0] for line in found] == [
        "--model_name_or_path is required",
        "--output_dir is required",
        "nothing to do",
        "no data",
    ]


def test_misspelt_flag_is_not_also_called_missing():
    assert problems("--outptu_dir", "x", base=[*BASE[:4], "--do_train"]) == [
        "--outptu_dir: unknown flag. Did you mean --output_dir?"
    ]


def test_abbreviation_is_suggested_not_taken():
    assert problems("--learn", "1") == ["--learn: unknown flag. Did you mean --learning_rate?"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("learning_rate", "1e999"),
        ("learning_rate", "-1e-5"),
        ("learning_rate", "1_0"),
        ("adam_beta2", "1"),
        ("adam_epsilon", "0"),
        ("label_smoothing_factor", "1.0"),
        ("hidden_dropout_prob", "1.1"),
        ("max_steps", "0"),
        ("max_steps", "1.5"),
        ("max_seq_length", "2"),
        ("max_train_samples", "0"),
        ("per_device_train_batch_size", "0"),
        ("num_train_epochs", "0"),
        ("warmup_steps", "-1"),
        ("seed", "4294967296"),
        ("save_steps", "9" * 5000),
        ("ddp_timeout", "١٢"),
    ],
)
def test_numbers_out_of_range(name, value):
    (line,) = problems(f"--{name}", value)
    assert line.startswith(f"--{name}: ") and FLAGS[name].range in line


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--output_dir"], "--output_dir needs a value: "),
        (["--seed="], "--seed: '' is not a whole number"),
        (["--seed", "1", "2"], "unexpected '2' after --seed"),
        (["--do_eval", "maybe"], "--do_eval: 'maybe' is not true or false"),
        (["--do_eval", "-fp16"], "unexpected '-fp16' after --do_eval: flags begin with --"),
        (["--no_fp16", "true"], "unexpected 'true' after --no_fp16"),
        (["--seed", "1", "late.json"], "unexpected 'late.json': only one config file is accepted, before all flags"),
        (["--device", "NPU"], "--device: 'NPU' is not "),
        (["--device", "npu:x"], "--device: 'npu:x' is not "),
        (["--report_to", "wandv"], "--report_to: unknown value 'wandv'. Did you mean wandb?"),
        (["--report_to", "none,wandb"], "--report_to none,wandb: none cannot be combined with a tracker"),
        (["--loss_scale", "0"], "--loss_scale '0' is not a positive number or dynamic"),
        (["--loss_scale", "nan"], "--loss_scale 'nan' is not a positive number or dynamic"),
        (["--warmup_steps", "1.5"], "--warmup_steps 1.5: a value above 1 must be a whole number"),
        (["--pad_to_max_length", "--padding", "packed"], "--pad_to_max_length contradicts --padding packed"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience 2 needs --eval_strategy"),
        (["--load_best_model_at_end"], "--load_best_model_at_end needs both strategies"),
        (["--metric_for_best_model", "lost"], "--metric_for_best_model: unknown metric 'lost'. Did you mean"),
        (["--metric_for_best_model", "pearson"], "--metric_for_best_model: unknown metric 'pearson'"),
    ],
)
def test_refused_values_and_combinations(extra, expected):
    (line,) = problems(*extra)
    assert line.startswith(expected)


def test_best_model_needs_an_evaluation_at_each_save():
    best = ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "200"]
    assert "must be a multiple of --eval_steps 200" in problems(*best)[0]
    args = parse([*BASE, *best, "--save_steps", "400", "--metric_for_best_model", "eval_f1"])
    assert args.metric_for_best_model == "f1" and args.do_eval


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (["--do_eval"], "no data: "),
        (["--do_eval", "--sample"], "--sample needs --task_name"),
        (["--do_eval", "--data_path", "d"], "--data_path needs --task_name"),
        (["--do_eval", "--task_name", "rte", "--dataset_name", "imdb"], "--dataset_name and --task_name are"),
        (["--do_eval", "--task_name", "rte", "--sample", "--data_path", "d"], "--data_path and --sample are"),
        (["--do_eval", "--train_file", "a.csv"], "--do_eval needs --validation_file"),
        (["--do_train", "--train_file", "a.txt"], "--train_file 'a.txt': unknown extension. Choices: .csv"),
        (["--do_eval", "--task_name", "rte", "--dataset_config_name", "x"], "--dataset_config_name needs"),
    ],
)
def test_sources_of_data(origin, expected):
    (line,) = problems(*origin, base=["--model_name_or_path", "m", "--output_dir", "o"])
    assert line.startswith(expected)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in TRAINABLE])
def test_companion_task_has_nothing_to_train_or_evaluate(name):
    found = problems("--do_eval", "--task_name", name)
    assert any(line.startswith("--do_train: ") for line in found)
    assert any(line.startswith("--do_eval: ") for line in found)
    assert parse([*BASE[:2], "--task_name", name.upper(), "--output_dir", "o", "--do_predict"]).task_name == name


@pytest.mark.parametrize("name", TRAINABLE)
def test_metrics_of_a_task_are_accepted(name):
    for metric in metric_names(TASKS[name]):
        args = parse([*BASE, "--task_name", name, "--metric_for_best_model", f"eval_{metric}"])
        assert args.metric_for_best_model == metric
    assert TASKS[name].headline in metric_names(TASKS[name])


def test_sample_needs_no_model():
    args = parse(["--sample", "--task_name", "sst2", "--do_train", "--output_dir", "o"])
    assert args.sample and args.model_name_or_path is None


def test_derived_values():
    args = parse([*BASE, "--pad_to_max_length", "--eval_strategy", "steps", "--logging_steps", "50"])
    assert (args.padding, args.eval_steps, args.do_eval) == ("max_length", 50, True)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_printed_config_can_be_fed_back(tmp_path, capsys, suffix):
    words = [*BASE, "--learning_rate", "3e-5", "--report_to", "wandb", "--device", "0", "--fp16", "--tf32"]
    assert main_parse([*words, "--eval_strategy", "steps", "--token", "secret", "--print_config"]) is None
    printed = capsys.readouterr().out
    assert "secret" not in printed
    config = tmp_path / f"config.{suffix}"  # JSON is YAML too
    config.write_text(printed, encoding="utf-8")
    assert as_config(parse([str(config)])) == json.loads(printed)
    assert parse([str(config), "--learning_rate", "1e-4"]).learning_rate == 1e-4
    assert parse([str(config), "--seed", "1"]).notices == ()


def test_yaml_keeps_what_yaml_would_change(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "learning_rate: 2e-5\neval_strategy: no\ndevice: 0\ndata_seed: null\nreport_to: [wandb, mlflow]\n"
        "evaluation_strategy:\n",
        encoding="utf-8",
    )
    args = parse([str(config), *BASE])
    assert (args.learning_rate, args.eval_strategy, args.device) == (2e-5, "no", "0")
    assert (args.data_seed, args.report_to) == (None, "wandb,mlflow")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("c.json", '{"sed": 1}', "c.json: sed: unknown flag. Did you mean --seed?"),
        ("c.json", '{"seed": "one"}', "c.json: seed: 'one' is not a whole number"),
        ("c.json", '{"seed": true}', "c.json: seed: 'true' is not a whole number"),
        ("c.json", '{"seed": null}', "c.json: seed: null is not a whole number"),
        ("c.json", '{"fp16": "yes"}', "c.json: fp16: 'yes' is not true or false"),
        ("c.json", '{"optim": {"a": [1]}}', "is not a text"),
        ("c.json", '{"seed": 1, "seed": 2}', "c.json: seed: --seed is given twice"),
        ("c.json", '{"eval_strategy": "no", "evaluation_strategy": "no"}', "--eval_strategy is given twice"),
        ("c.json", '{"learning_rate": NaN}', "c.json: learning_rate: 'nan' is not a number"),
        ("c.json", '{"help": true}', "c.json: help: "),
        ("c.json", '{"seed": 1', "line 1 column"),
        ("c.json", "[1]", "not an object of flags"),
        ("c.json", "[" * 100_000, "config file"),
        ("c.json", '{"seed": ' + "9" * 5000 + "}", "config file"),
        ("c.yaml", "do_eval: true\nsed: 1\n", "c.yaml:2: sed: unknown flag. Did you mean --seed?"),
        ("c.yaml", "seed: one\n", "c.yaml:1: seed: 'one' is not a whole number"),
        ("c.yaml", "seed: 1\nseed: 1\n", "c.yaml:2: seed: --seed is given twice"),
        ("c.yaml", "seed: &a [*a]\n", "c.yaml:1: seed: "),
        ("c.yaml", "seed: [1\n", "config file"),
        ("c.yaml", "- seed\n", "not a mapping of flags"),
    ],
)
def test_broken_config_names_file_and_key(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        parse([str(tmp_path / name), *BASE])
    (line,) = str(caught.value).splitlines()
    assert name in line and expected in line


def test_unreadable_config(tmp_path):
    assert "No such file" in problems(base=[str(tmp_path / "absent.json")])[0]
    (tmp_path / "latin.json").write_bytes(b'{"run_name": "\xe9"}')
    assert len(problems(base=[str(tmp_path / "latin.json")])) == 1


@pytest.mark.parametrize("words", [["--help"], ["-h"], [*BASE, "--help"]])
def test_help_shows_the_flags_that_people_use(monkeypatch, capsys, words):
    monkeypatch.setenv("COLUMNS", "100")
    assert main_parse(words) is None
    text = capsys.readouterr().out
    flags = re.findall(r"^  --(?:\[no_\])?(\w+) ?", text, re.MULTILINE)
    assert set(flags) - {"help", "version", "print_config"} == COMMON and 25 <= len(COMMON) <= 35
    assert f"{len(FLAGS) - len(COMMON)} more flags: --help all" in text


def test_help_on_a_group_on_a_flag_and_on_nothing(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    shown = []
    for topic in topics():
        assert main_parse(["--help", topic.upper()]) is None
        shown += re.findall(r"^  --(?:\[no_\])?(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert shown == [*FLAGS]  # every flag is in one group
    for topic in ("learning_rate", "--learning-rate", "lr"):
        assert main_parse([f"--help={topic}"]) is None
        assert capsys.readouterr().out.startswith("  --learning_rate NUMBER ")
    for topic in ("presicion", "nothing at all", ","):
        with pytest.raises(UsageError, match="unknown topic .*precision, device, or the name of a flag"):
            main_parse(["--help", topic])


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
def test_help_fits_the_terminal_and_names_every_flag(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main_parse([*BASE, "--help", "all"]) is None
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= max(columns, 48)
    for name, flag in FLAGS.items():
        assert f"--{'[no_]' if flag.kind == 'bool' else ''}{name}" in text
        assert flag.range in " ".join(text.split())


def test_help_and_errors_import_nothing_heavy():
    """The command line answers before anything slow is loaded (torch alone takes seconds)."""
    code = (
        "import sys\nfrom bert_glue.config.parser import main_parse\nmain_parse(['--help'])\n"
        "try: main_parse(['--nonsense'])\nexcept Exception: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'yaml', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys):
    from bert_glue import __version__

    assert main_parse(["--version"]) is None
    assert capsys.readouterr().out.strip() == __version__


WORDS = st.one_of(
    st.sampled_from([f"--{name}" for name in (*FLAGS, *LEGACY_FLAGS)]),
    st.sampled_from([f"--no_{name}" for name in (*FLAGS, *LEGACY_FLAGS)]),
    st.sampled_from(["true", "none", "1", "-1", "1e400", "nan", "", "--", "-", "dynamic", "mnli", "x.csv"]),
    st.builds("--{}={}".format, st.sampled_from([*FLAGS, *LEGACY_FLAGS]), st.text(max_size=8)),
    st.text(max_size=12),
    st.text(alphabet="-=_ae1.\udc80\n", max_size=12),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(WORDS, max_size=12))
def test_any_command_line_ends_in_settings_or_plain_lines(argv):
    try:
        assert isinstance(parse(argv), Arguments)
    except UsageError as error:
        lines = str(error).split("\n")
        assert all(line.strip() and line.isprintable() for line in lines)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
CONFIGS = st.dictionaries(st.sampled_from([*FLAGS, *LEGACY_FLAGS, "x"]), JSON_VALUES, max_size=5)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    text=st.binary(max_size=60) | CONFIGS.map(lambda value: json.dumps(value).encode()),
    suffix=st.sampled_from(["json", "yaml", "yml"]),
)
def test_any_config_file_ends_in_settings_or_plain_lines(tmp_path, text, suffix):
    path = tmp_path / f"fuzz.{suffix}"
    path.write_bytes(text)
    try:
        parse([str(path), *BASE])
    except UsageError as error:
        assert all(line.strip() and line.isprintable() for line in str(error).split("\n"))


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_pickle_weights"])
def test_a_file_cannot_ask_to_run_code(name, tmp_path):
    config = tmp_path / "config.json"
    settings = {"sample": True, "task_name": "mrpc", "do_train": True, "output_dir": "x", name: True}
    config.write_text(json.dumps(settings))
    args = parse([str(config)])
    assert getattr(args, name) is False
    assert any(f"{name} is ignored in a file" in notice for notice in args.notices)
    args = parse([str(config), f"--{name}"])
    assert getattr(args, name) is True
    assert not any("is ignored in a file" in notice for notice in args.notices)
