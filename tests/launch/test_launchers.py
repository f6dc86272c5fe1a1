"""The launchers as black boxes: what run_glue.py gets, what comes back, signals."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from launch_stubs import (
    REPOSITORY,
    called,
    clean_environment,
    copy_repository,
    launch,
    wait_for,
    write_script,
)

from bert_glue import tasks
from bert_glue.config.arguments import Arguments
from bert_glue.config.parser import parse
from bert_glue.errors import MachineError
from bert_glue.launch import results as launch_results
from bert_glue.tasks import TASKS, TRAINABLE

# Words of each launcher before there were recipes: which published run, epochs, and what it passed.
ALL_LAUNCHERS = (
    "--do_train --max_seq_length 128 --dataloader_drop_last --fp16 --loss_scale 1024.0 --fallback_precision fp32"
    " --optim adamw_apex_fused_npu --use_combine_grad --skip_steps 5"
)
BEFORE_RECIPES = {
    "train_full_1p.sh": "1p published --do_eval --fp16_opt_level O2 --save_strategy epoch --save_total_limit 1",
    "train_full_8p.sh": "8p published --do_eval --fp16_opt_level O2 --save_strategy steps --save_steps 50000",
    "train_multinode.sh": "8p published --do_eval --fp16_opt_level O2 --save_strategy epoch --save_total_limit 2"
    " --resume_from_checkpoint auto",
    "train_bert_base_cased_full_8p.sh": "base published --do_eval --fp16_opt_level O1 --save_strategy steps"
    " --save_steps 50000",
    "train_performance_1p.sh": "1p 1 --fp16_opt_level O2 --save_strategy no",
    "train_performance_8p.sh": "8p 1 --fp16_opt_level O2 --save_strategy no",
    "train_performance_8p_wnli.sh": "8p 80 --fp16_opt_level O2 --save_strategy no",
    "train_bert_base_cased_performance_8p.sh": "base 1 --fp16_opt_level O1 --save_strategy no",
}
NEEDED = ["--task_name=mrpc", "--output_dir=o", "--do_train", "--do_eval", "--recipe=stable"]
FINAL = (
    "Final Performance samples/sec : ",
    "Final Performance images/sec : ",
    "Final Train Accuracy : ",
    "E2E Training Duration sec : ",
)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return copy_repository(tmp_path)


def value_of(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


# What a launcher hands to run_glue.py


def settings_of(argv: list[str]) -> Arguments:
    """What run_glue.py makes of a launcher's words, without what differs from call to call."""
    return replace(parse(argv), output_dir="", recipe=None, notices=())


@pytest.mark.parametrize(
    ("launcher", "source"),
    [
        *((launcher, []) for launcher in BEFORE_RECIPES),
        *(pytest.param(launcher, ["--sample"], marks=pytest.mark.slow) for launcher in BEFORE_RECIPES),
        ("train_full_1p.sh", ["--sample", "--model=m"]),
        ("train_full_1p.sh", ["--sample", "--train_epochs=2"]),
    ],
)
def test_the_effect_is_that_of_the_published_words(repo: Path, launcher: str, source: list[str]) -> None:
    task, words = "stsb", BEFORE_RECIPES[launcher].split()  # published with 3 epochs on 1 device, 5 on 8
    column, ranks = {"1p": (1, []), "8p": (3, ["--nproc=1"]), "base": (4, ["--nproc=1"])}[words.pop(0)]
    epochs = words.pop(0)
    epochs = str(TASKS[task].published[column].epochs) if epochs == "published" else epochs
    if launcher.endswith("wnli.sh"):
        task = "wnli"
    else:
        ranks = [*ranks, f"--TASK={task}"]
    done = launch(repo, *ranks, *source, launcher=launcher)
    assert done.returncode == 0, done.stderr
    model = "google-bert/bert-base-cased" if "base" in launcher else "google-bert/bert-large-cased"
    words += ["--per_device_train_batch_size=32", "--per_device_eval_batch_size=32", f"--task_name={task}"]
    words += ["--output_dir=o", *ALL_LAUNCHERS.split()]
    if not source:
        words += [f"--num_train_epochs={epochs}", "--learning_rate=2e-5", f"--model_name_or_path={model}"]
    else:
        words += [
            word.replace("--model=", "--model_name_or_path=").replace("train_e", "num_train_e") for word in source
        ]
    (call,) = (repo / "test/output/0").glob("called.json*")
    now, wanted = settings_of(json.loads(call.read_text())["argv"]), settings_of(words)
    if now.save_strategy != "steps":
        now = replace(now, save_steps=wanted.save_steps)  # not looked at
    assert now == wanted


def test_another_recipe_is_taken_as_it_is(repo: Path) -> None:
    own = repo.parent / "own recipe.json"
    own.write_text('{"learning_rate": 3e-5, "save_strategy": "no"}')
    for launcher, ranks, note in (
        ("train_full_1p.sh", [], "called.json"),
        ("train_bert_base_cased_full_8p.sh", ["--nproc=1"], "called.json.0"),
    ):
        done = launch(repo, "--TASK=mrpc", "--recipe=stable", *ranks, launcher=launcher)
        assert done.returncode == 0, done.stderr
        argv = json.loads((repo / "test/output/0" / note).read_text())["argv"]
        stable = settings_of([*NEEDED, f"--model_name_or_path={value_of(argv, '--model_name_or_path')}"])
        assert replace(settings_of(argv), skip_steps=0) == stable
    launch(repo, "--TASK=mrpc", "--recipe", "own recipe.json", "--batch_size=4")
    argv = called(repo)["argv"]
    assert value_of(argv, "--recipe") == "own recipe.json" and "--save_strategy" not in argv


def test_sample_with_the_stable_recipe_keeps_its_own_rate(repo: Path) -> None:
    assert launch(repo, "--TASK=mrpc", "--recipe=stable", "--sample").returncode == 0
    args = parse(called(repo)["argv"])
    assert (args.learning_rate, args.num_train_epochs) == (5e-4, 10.0)
    assert args.load_best_model_at_end and args.warmup_steps == 0.1
    assert "its learning_rate and num_train_epochs are for GLUE and not used with --sample" in args.notices[0]


def test_sample_leaves_model_rate_and_epochs_to_run_glue(repo: Path) -> None:
    assert launch(repo, "--TASK=mrpc", "--sample").returncode == 0
    argv = called(repo)["argv"]
    assert "--sample" in argv
    assert not {"--learning_rate", "--num_train_epochs", "--model_name_or_path"} & set(argv)
    launch(repo, "--TASK=mrpc", "--sample", "--train_epochs=2", "--model=my model")
    argv = called(repo)["argv"]
    assert (value_of(argv, "--num_train_epochs"), value_of(argv, "--model_name_or_path")) == ("2", "my model")


def test_flags_with_blanks_both_spellings_and_a_rest(repo: Path) -> None:
    data = repo.parent / "my data"
    data.mkdir()
    done = launch(
        repo, "--TASK", "stsb", "--data_path", "my data", "--output_dir=out put", "--batch_size", "8",
        "--device=cpu", "--", "--run_name", "a b", "--seed=7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    argv = json.loads((repo.parent / "out put" / "called.json").read_text())["argv"]
    assert argv[-3:] == ["--run_name", "a b", "--seed=7"]
    assert value_of(argv, "--data_path") == "my data"
    assert value_of(argv, "--per_device_train_batch_size") == "8"
    assert value_of(argv, "--recipe") == "reference"
    assert (repo.parent / "out put" / "train_cpu.log").is_file()


def test_a_model_folder_in_the_root_goes_before_the_hub(repo: Path) -> None:
    (repo / "bert-large-cased").mkdir()
    launch(repo, "--TASK=rte")
    argv = called(repo)["argv"]
    assert value_of(argv, "--model_name_or_path") == str(repo / "bert-large-cased")


def test_performance_launcher_trains_one_epoch_and_saves_nothing(repo: Path) -> None:
    done = launch(repo, "--TASK=mrpc", launcher="train_performance_1p.sh", STUB_RESULTS='{"eval_f1": null}')
    argv = called(repo)["argv"]
    assert "--do_eval" not in argv
    assert (value_of(argv, "--num_train_epochs"), value_of(argv, "--save_strategy")) == ("1", "no")
    assert (repo / "test/output/0/Bert_bert-stub_mrpc_bs32_1p_perf.log").is_file(), done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--sample"], 2, "--TASK: missing. Choices: cola, sst2, mrpc"),
        (["--TASK=mrcp"], 2, "Did you mean mrpc?"),
        (["--TASK=ax"], 2, "unknown task"),
        (["--task=mrpc"], 2, "Did you mean --TASK?"),
        (["--TASK=mrpc", "--epochs=2"], 2, "Did you mean --train_epochs?"),
        (["--TASK=mrpc", "--num_train_epochs=2"], 2, "Did you mean --train_epochs?"),
        (["--TASK=mrpc", "--per_device_train_batch_size=2"], 2, "Did you mean --batch_size?"),
        (["--TASK=mrpc", "--device_id=2"], 2, "Did you mean --device?"),
        (["--task_name=mrpc"], 2, "Did you mean --TASK?"),
        (["--TASK=mrpc", "--model_name_or_path=m"], 2, "Did you mean --model?"),
        (["mrpc"], 2, "unknown flag mrpc"),
        (["--TASK"], 2, "--TASK needs a value"),
        (["--TASK=mrpc", "--model="], 2, "--model needs a value"),
        (["--TASK=mrpc", "--sample=yes"], 2, "--sample takes no value"),
        (["--TASK=mrpc", "--recipe=stabel"], 2, "Did you mean stable?"),
        (["--TASK=mrpc", "--batch_size=0"], 2, "--batch_size: 0"),
        (["--TASK=mrpc", "--train_epochs=many"], 2, "--train_epochs: many"),
        (["--TASK=mrpc", "--", "--output_dir=x"], 2, "put --output_dir before --"),
        (["--TASK=mrpc", "--data_path=nowhere"], 3, "the folder nowhere does not exist"),
    ],
)
def test_usage_errors_are_one_line_before_anything_is_set_up(
    repo: Path, flags: list[str], code: int, says: str
) -> None:
    done = launch(repo, *flags)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not (repo / "test" / "output").exists()


def test_help(repo: Path) -> None:
    done = launch(repo, "--help")
    assert done.returncode == 0
    assert "--train_epochs=N" in done.stdout


# What comes back


def test_final_lines_and_case_log(repo: Path) -> None:
    done = launch(repo, "--TASK=mrpc")
    values = ("200.000", "200.000", "0.9029", "61.0")
    assert done.stdout.splitlines()[-4:] == [name + value for name, value in zip(FINAL, values, strict=True)]
    log = (repo / "test/output/0/Bert_bert-stub_mrpc_bs32_1p_acc.log").read_text()
    assert log.splitlines() == [
        "Network = bert-stub",
        "RankSize = 1",
        "BatchSize = 32",
        f"DeviceType = {platform.machine()}",
        "CaseName = Bert_bert-stub_mrpc_bs32_1p_acc",
        "ActualFPS = 200.000",
        "TrainingTime = 160.00",
        "ActualLoss = 0.250000",
        "E2ETrainingTime = 61.0",
        "TrainAccuracy = 0.9029",
        "Device = cpu",
    ]


def test_a_figure_that_was_not_measured_is_null_with_its_reason(repo: Path) -> None:
    results = {
        "train_samples_per_second": None,
        "train_samples_per_second_reason": "3 steps, 5 skipped",
        "eval_f1": None,
    }
    done = launch(repo, "--TASK=mrpc", STUB_RESULTS=json.dumps(results))
    lines = done.stdout.splitlines()[-4:]
    assert lines[0] == FINAL[0] + "null (3 steps, 5 skipped)"
    assert lines[2] == FINAL[2] + "null (undefined)"
    log = (repo / "test/output/0/Bert_bert-stub_mrpc_bs32_1p_acc.log").read_text()
    assert "ActualFPS = null (3 steps, 5 skipped)\nTrainingTime = null (3 steps, 5 skipped)\n" in log


def test_sample_results_are_labelled(repo: Path) -> None:
    done = launch(repo, "--TASK=mrpc", "--sample")
    assert all(line.endswith(" (sample data, not GLUE)") for line in done.stdout.splitlines()[-4:])
    assert "not GLUE" in (repo / "test/output/0/Bert_bert-stub_mrpc_bs32_1p_acc.log").read_text()


def test_output_goes_to_the_screen_and_the_log_and_the_last_log_is_kept(repo: Path) -> None:
    launch(repo, "--TASK=mrpc", STUB_EXIT="5")
    done = launch(repo, "--TASK=mrpc")
    assert "to stdout" in done.stdout and "to stderr" not in done.stdout
    assert "to stderr" in done.stderr
    folder = repo / "test/output/0"
    text = (folder / "train_0.log").read_text()  # two streams: their lines may mix
    assert (text.count("to stdout"), text.count("to stderr"), len(text.split())) in ((1, 1, 4), (1, 1, 3))
    assert "to stdout" in (folder / "train_0.log.previous").read_text()


def test_logs_are_not_written_through_links(repo: Path, tmp_path: Path) -> None:
    """A link to a file, a link to nothing, and a link to a folder in the place of the log that is kept."""
    folder, victims = repo / "test/output/mrpc/bert-large-cased_1p_acc", tmp_path / "victims"
    folder.mkdir(parents=True)
    victims.mkdir()
    (victims / "file").write_text("precious")
    for target in ("file", "nothing"):
        for path in folder.glob("train_0.log*"):
            path.unlink()
        (folder / "train_0.log").symlink_to(victims / target)
        (folder / "train_0.log.previous").symlink_to(victims)
        assert launch(repo, "--TASK=mrpc").returncode == 0
        assert "to stdout" in (folder / "train_0.log").read_text() and not (folder / "train_0.log").is_symlink()
        assert [path.name for path in victims.iterdir()] == ["file"]
    assert (victims / "file").read_text() == "precious"


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 7])
def test_exit_code_is_passed_on_and_no_old_result_is_reported(repo: Path, code: int) -> None:
    assert launch(repo, "--TASK=mrpc").returncode == 0
    done = launch(repo, "--TASK=mrpc", STUB_EXIT=str(code))
    assert done.returncode == code
    assert "Final" not in done.stdout
    assert f"exit code {code}" in done.stderr.splitlines()[-1]


def test_results_that_are_not_json_are_an_error(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = repo.parent / "out"
    folder.mkdir()
    assert launch_results.main(["report", str(folder), "--case", "acc"]) == 4
    (folder / "all_results.json").write_text('{"task_name"')
    assert launch_results.main(["report", str(folder), "--case", "acc"]) == 4
    (folder / "all_results.json").write_text("{}")
    assert launch_results.main(["report", str(folder), "--case", "acc"]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("all_results.json" in line for line in lines)


def test_published_epochs() -> None:
    epochs = dict(tasks.base_epochs(name) for name in TRAINABLE)
    table = {"cola": 3, "sst2": 3, "mrpc": 5, "stsb": 3, "qqp": 3, "mnli": 3, "qnli": 3, "rte": 3, "wnli": 5}
    assert epochs == table  # Hugging Face's README


def perf_run(repo: Path, speed: float | None, *flags: str, **results) -> subprocess.CompletedProcess[str]:
    figures = {"train_samples_per_second": speed, "train_samples_per_second_reason": "too short", **results}
    return launch(repo, "--TASK=mrpc", *flags, launcher="train_performance_1p.sh", STUB_RESULTS=json.dumps(figures))


def test_a_performance_run_is_held_against_its_baseline(repo: Path) -> None:
    assert perf_run(repo, 200.0).returncode == 0
    perf = repo / "test/output/0/perf.json"
    first = json.loads(perf.read_text())
    assert first["samples_per_second"] == 200.0 and first["step_ms"] == {"median": 159.0, "p10": 150.0, "p90": 171.0}
    assert (
        first["seconds"]["data"] == 3.0 and first["seconds"]["compile"] is None and first["reasons"]["seconds.compile"]
    )
    stored = repo.parent / "stored perf.json"
    shutil.copy(perf, stored)
    same = perf_run(repo, 191.0, "--baseline", "stored perf.json")
    assert same.returncode == 0 and "Performance : 0.955 x the baseline's 200.000 samples/s" in same.stdout
    assert same.stdout.splitlines()[-4].startswith("Final Performance samples/sec : 191.000")
    slow = perf_run(repo, 189.0, "--baseline", "stored perf.json")
    assert slow.returncode == 9
    assert slow.stderr.splitlines()[-1].startswith("error: slower than the baseline by more than 5%: 0.945 x")
    assert json.loads(perf.read_text())["samples_per_second"] == 189.0
    itself = perf_run(repo, 170.0, f"--baseline={perf}")
    assert itself.returncode == 9  # against what the file held before


def test_what_perf_json_has_no_figure_for_has_the_runs_reason(repo: Path) -> None:
    reasons = {"train_share_of_gemm": None, "train_share_of_gemm_reason": "not counted for this encoder"}
    assert perf_run(repo, 200.0, **reasons).returncode == 0
    perf = json.loads((repo / "test/output/0/perf.json").read_text())
    assert perf["share_of_gemm"] is None and perf["reasons"]["share_of_gemm"] == "not counted for this encoder"


@pytest.mark.parametrize(
    ("speed", "results", "says"),
    [
        (500.0, {"device_name": "a faster stub"}, "device_name 'stub', now 'a faster stub'"),
        (500.0, {"world_size": 8}, "world_size 1, now 8"),
        (500.0, {"per_device_train_batch_size": 64}, "per_device_train_batch_size 32, now 64"),
        (500.0, {"precision": "O0 fp32", "task_name": "rte"}, "precision 'O2 fp16', now 'O0 fp32'; task_name 'mrpc'"),
        (None, {}, "this run has no samples/s: too short"),
    ],
)
def test_another_setup_is_not_compared(repo: Path, speed, results: dict, says: str) -> None:
    assert perf_run(repo, 200.0).returncode == 0
    stored = repo / "test/output/0/perf.json"
    shutil.copy(stored, repo.parent / "stored.json")
    done = perf_run(repo, speed, "--baseline=stored.json", **results)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": 1, "setup": {}, "samples_per_second": null}'])
def test_what_is_no_baseline_is_said_before_anything_runs(repo: Path, text: str | None) -> None:
    if text is not None:
        (repo.parent / "perf.json").write_text(text)
    done = perf_run(repo, 200.0, "--baseline=perf.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "perf.json" in done.stderr
    assert not (repo / "test/output").exists()


# Where it goes


@pytest.mark.parametrize(
    ("launcher", "flags", "folder", "log"),
    [
        ("train_full_1p.sh", [], "mrpc/bert-large-cased_1p_acc", "0/train_0.log"),
        ("train_full_1p.sh", ["--sample"], "mrpc/tiny_1p_acc_sample", "0/train_0.log"),
        ("train_full_1p.sh", ["--sample", "--model=a/b c/"], "mrpc/b_c_1p_acc_sample", "0/train_0.log"),
        (
            "train_full_1p.sh",
            ["--model=google-bert/bert-base-uncased"],
            "mrpc/bert-base-uncased_1p_acc",
            "0/train_0.log",
        ),
        ("train_full_1p.sh", ["--device=npu:3"], "mrpc/bert-large-cased_1p_acc", "3/train_3.log"),
        ("train_full_1p.sh", ["--device=2"], "mrpc/bert-large-cased_1p_acc", "2/train_2.log"),
        ("train_full_1p.sh", ["--device=cpu"], "mrpc/bert-large-cased_1p_acc", "cpu/train_cpu.log"),
        ("train_performance_1p.sh", [], "mrpc/bert-large-cased_1p_perf", "0/train_0.log"),
        ("train_full_8p.sh", ["--nproc=2"], "mrpc/bert-large-cased_2p_acc", "0/train_0.log"),
        ("train_bert_base_cased_full_8p.sh", ["--nproc=2"], "mrpc/bert-base-cased_2p_acc", "0/train_0.log"),
        ("train_bert_base_cased_performance_8p.sh", ["--nproc=2"], "mrpc/bert-base-cased_2p_perf", "0/train_0.log"),
    ],
)
def test_no_two_launchers_share_a_folder_and_a_device_id_leads_to_the_newest(
    repo: Path, launcher: str, flags: list[str], folder: str, log: str
) -> None:
    done = launch(repo, "--TASK=mrpc", *flags, launcher=launcher)
    assert done.returncode == 0, done.stderr
    output = repo / "test/output"
    assert list((output / folder).glob("called.json*"))
    assert "to stdout" in (output / log).read_text()
    assert (output / log).parent.resolve() == (output / folder).resolve()


def test_a_harness_that_names_the_device_finds_its_log(repo: Path) -> None:
    assert launch(repo, "--TASK=mrpc", ASCEND_DEVICE_ID="5").returncode == 0
    assert launch(repo, "--TASK=rte", ASCEND_DEVICE_ID="5").returncode == 0
    assert (repo / "test/output/5").resolve() == repo / "test/output/rte/bert-large-cased_1p_acc"
    assert (repo / "test/output/5/train_5.log").is_file()
    assert launch(repo, "--TASK=rte", ASCEND_DEVICE_ID="../x").returncode == 0
    assert (repo / "test/output/0/train_0.log").is_file()


def test_a_users_own_folder_is_no_link_and_gets_none(repo: Path) -> None:
    (repo / "test/output/0").mkdir(parents=True)
    assert launch(repo, "--TASK=mrpc").returncode == 0
    assert launch(repo, "--TASK=mrpc", "--device=1", f"--output_dir={repo}/own").returncode == 0
    assert list((repo / "test/output/0").iterdir()) == [] and not (repo / "test/output/1").exists()


def test_logged_losses_are_a_file(repo: Path) -> None:
    folder = repo / "test/output/mrpc/bert-large-cased_1p_acc"
    folder.mkdir(parents=True)
    entries = [{"step": 5, "loss": 0.5}, {"step": 5, "eval_loss": 0.6}, {"step": 10, "loss": 0.25}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert launch(repo, "--TASK=mrpc").returncode == 0
    assert (folder / "train_Bert_bert-stub_mrpc_bs32_1p_acc_loss.txt").read_text() == "0.500000\n0.250000\n"


@pytest.mark.parametrize("history", [None, [None], {"loss": 0.5}, "lost"], ids=str)
def test_a_damaged_list_of_losses_is_named(tmp_path: Path, history: object) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    with pytest.raises(MachineError, match="trainer_state.json: log_history is not a list of objects"):
        launch_results.losses(tmp_path)


# Signals


def start_and_signal(repo: Path, number: int, **settings: str) -> tuple[int, Path]:
    """Exit code of a launcher that got a signal while run_glue.py slept, and its output folder."""
    folder = repo / "test/output/0"
    child = subprocess.Popen(
        ["bash", str(repo / "test/train_full_1p.sh"), "--TASK=mrpc"],
        env=clean_environment(STUB_SLEEP="30", **settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(folder / "sleeping")
        child.send_signal(number)
        return child.wait(timeout=15), folder
    finally:
        child.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_python_and_its_last_words_are_logged(repo: Path, number: int, code: int) -> None:
    returned, folder = start_and_signal(repo, number)
    assert returned == code
    assert (folder / "got_signal").read_text() == str(int(number))
    assert "saved a checkpoint" in (folder / "train_0.log").read_text()


def test_a_failed_checkpoint_after_a_signal_is_told(repo: Path) -> None:
    assert start_and_signal(repo, signal.SIGTERM, STUB_STOP="6")[0] == 6


def test_nothing_is_left_running(repo: Path) -> None:
    done = launch(repo, "--TASK=mrpc", STUB_ORPHAN="1", STUB_EXIT="7")
    assert done.returncode == 7
    orphan = Path("/proc") / (repo / "test/output/0/orphan").read_text()
    state = (orphan / "stat").read_text().rsplit(")", 1)[1].split()[0] if orphan.exists() else "gone"
    assert state in ("gone", "Z")


# The test launcher


def python_for_tests(repo: Path, status_of_ruff: int = 0) -> tuple[dict[str, str], Path]:
    """Settings with a python that only writes down calls of ruff and pytest, and the file it writes."""
    python, calls = repo.parent / "tools/python", repo.parent / "calls"
    script = [
        "#!/bin/bash",
        'case "$*" in',
        '  *launch.requirements* | "-m venv"*) ;;',
        f'  "-m tools.stacks"*) echo "$*" >>"{calls}" ;;',
        f'  "-m tools.requirements_audit"*) echo "$*" >>"{calls}" ;;',
        f'  "-m ruff"*) echo "$*" >>"{calls}"; exit {status_of_ruff} ;;',
        f'  "-m pytest"*) echo "$*" >>"{calls}" ;;',
        '  *) exec REAL "$@" ;;',
        "esac",
    ]
    write_script(python, "\n".join(script))
    return {"BERT_GLUE_PYTHON": str(python)}, calls


def test_the_gate_lints_then_runs_pytest_with_the_flags(repo: Path) -> None:
    settings, calls = python_for_tests(repo)
    (repo / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci/run", repo / ".ci/run")
    command = ["bash", str(repo / ".ci/run"), "-k", "x"]
    subprocess.run(command, env=clean_environment(**settings), check=True, timeout=60)
    lint, style, audit, tests = calls.read_text().splitlines()
    assert audit.startswith("-m tools.requirements_audit ")
    assert (lint, style) == ("-m ruff check .", "-m ruff format --check .")
    assert "-m not slow" in tests and tests.endswith("-k x")


def test_full_means_slow_tests_too(repo: Path) -> None:
    settings, calls = python_for_tests(repo)
    assert launch(repo, "--full", launcher="run_tests.sh", **settings).returncode == 0
    *_, stacks, tests = calls.read_text().splitlines()
    assert stacks.startswith("-m tools.stacks") and stacks.endswith("/.venv-stacks --beside")
    assert tests.startswith("-m pytest") and "not slow" not in tests


def test_a_lint_error_fails_the_gate(repo: Path) -> None:
    settings, calls = python_for_tests(repo, status_of_ruff=1)
    assert launch(repo, launcher="run_tests.sh", **settings).returncode == 1
    assert "pytest" not in calls.read_text()


def test_launchers_are_settings_and_one_call() -> None:
    for file in (REPOSITORY / "test").glob("train_*.sh"):
        lines = file.read_text().splitlines()
        assert len(lines) <= 30, file.name
        assert lines[-1] in ('launch "$@"', 'exec "$PYTHON" "${sweep[@]}"')
        assert os.access(file, os.X_OK)
