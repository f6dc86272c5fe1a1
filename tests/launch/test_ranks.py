"""Launchers of several ranks as black boxes: what each rank gets, and how a launch ends when one rank does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_stubs import REPOSITORY, clean_environment, copy_repository, launch, wait_for

from bert_glue.launch.ranks import network_to, verdict

EIGHT = (
    "train_full_8p.sh",
    "train_performance_8p.sh",
    "train_performance_8p_wnli.sh",
    "train_bert_base_cased_full_8p.sh",
    "train_bert_base_cased_performance_8p.sh",
)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return copy_repository(tmp_path)


def calls(repo: Path, output: str) -> list[dict]:
    """What each rank's run_glue.py was given, in the order of ranks."""
    files = sorted((repo / output).glob("called.json.*"), key=lambda file: int(file.suffix[1:]))
    return [json.loads(file.read_text()) for file in files]


def value_of(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def alive_below(folder: Path) -> list[str]:
    """Command lines of processes that name `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command and process.name != str(os.getpid()):
            found.append(command)
    return found


def is_running(pid: str) -> bool:
    stat = Path("/proc") / pid / "stat"
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# What the ranks get


def test_each_rank_gets_its_place(repo: Path) -> None:
    done = launch(repo, "--TASK=stsb", "--nproc=3", "--device=cpu", launcher="train_full_8p.sh")
    assert done.returncode == 0, done.stderr
    found = calls(repo, "test/output/stsb/bert-large-cased_3p_acc")
    assert [call["env"]["RANK"] for call in found] == ["0", "1", "2"]
    for rank, call in enumerate(found):
        env = call["env"]
        assert (env["LOCAL_RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"]) == (str(rank), "3", "127.0.0.1")
        assert int(env["OMP_NUM_THREADS"]) >= 1
        assert call["cwd"] == str(repo.parent)
    assert len({(call["env"]["MASTER_PORT"], *call["argv"]) for call in found}) == 1
    assert value_of(found[0]["argv"], "--device") == "cpu"


def test_one_log_a_rank_and_the_first_one_is_shown(repo: Path) -> None:
    done = launch(repo, "--TASK=mrpc", "--nproc=2", launcher="train_full_8p.sh")
    assert done.stdout.splitlines()[0] == "to stdout" and "to stderr" in done.stderr
    assert done.stdout.count("to stdout") == 1
    assert done.stdout.splitlines()[-4].startswith("Final Performance samples/sec : 200.000")
    folder = repo / "test/output/mrpc/bert-large-cased_2p_acc"
    for rank in (0, 1):
        text = (folder / f"train_rank_{rank}.log").read_text()
        assert "to stdout" in text and "to stderr" in text
    assert (folder / "Bert_bert-stub_mrpc_bs32_2p_acc.log").is_file()
    launch(repo, "--TASK=mrpc", "--nproc=2", launcher="train_full_8p.sh")
    assert (folder / "train_rank_1.log.previous").read_text() == (folder / "train_rank_1.log").read_text()


def test_logs_of_ranks_are_not_written_through_links(repo: Path, tmp_path: Path) -> None:
    folder, victims = repo / "test/output/mrpc/bert-large-cased_2p_acc", tmp_path / "victims"
    folder.mkdir(parents=True)
    victims.mkdir()
    names = ["train_rank_0.log", "train_rank_1.log", "launcher_0.log"]
    for name in names[1:]:
        (victims / name).write_text("precious")
    for name in names:  # the first is a link to nothing
        (folder / name).symlink_to(victims / name)
    assert launch(repo, "--TASK=mrpc", "--nproc=2", launcher="train_full_8p.sh").returncode == 0
    assert sorted(path.name for path in victims.iterdir()) == sorted(names[1:])
    assert {(victims / name).read_text() for name in names[1:]} == {"precious"}
    assert not any((folder / name).is_symlink() for name in names)


@pytest.mark.parametrize(
    ("launcher", "flags", "says"),
    [
        ("train_full_8p.sh", ["--TASK=mrpc", "--nproc=0"], "--nproc: 0 is not a number >= 1"),
        ("train_full_8p.sh", ["--TASK=mrpc", "--nproc=many"], "--nproc: many"),
        ("train_full_8p.sh", ["--TASK=mrpc", "--device=npu:3"], "each rank uses its own device; give npu"),
        ("train_full_8p.sh", ["--TASK=mrpc", "--nnodes=2"], "unknown flag --nnodes"),
        ("train_full_1p.sh", ["--TASK=mrpc", "--nproc=2"], "unknown flag --nproc"),
        ("train_full_8p.sh", ["--TASK=mrpc", "--baseline=x"], "unknown flag --baseline"),
        ("train_full_8p.sh", [], "--TASK: missing"),
        ("train_multinode.sh", ["--TASK=mrpc", "--nnodes=2"], "--nnodes 2 needs --master_addr"),
        ("train_multinode.sh", ["--TASK=mrpc", "--nnodes=2", "--node_rank=2"], "--node_rank: 2 is not one of 0 to 1"),
        ("train_multinode.sh", ["--TASK=mrpc", "--nnodes=2", "--node_rank=08"], "--node_rank: 08"),
        ("train_multinode.sh", ["--TASK=mrpc", "--master_port=70000"], "--master_port: 70000 is not a port"),
        ("train_full_8p.sh", ["--TASK=mrpc", "--", "--ddp_timeout", "soon"], "--ddp_timeout: soon"),
    ],
)
def test_usage_errors_are_one_line(repo: Path, launcher: str, flags: list[str], says: str) -> None:
    done = launch(repo, *flags, launcher=launcher)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and says in done.stderr
    assert not (repo / "test/output").exists()


def test_help_names_the_flags_of_this_launcher(repo: Path) -> None:
    texts = {name: launch(repo, "--help", launcher=name).stdout for name in ("train_full_1p.sh", *EIGHT)}
    assert "--nproc" not in texts["train_full_1p.sh"] and "--baseline" not in texts["train_full_8p.sh"]
    assert all("--nproc=N" in texts[name] for name in EIGHT)
    assert "--baseline=FILE" in texts["train_performance_8p.sh"] and "default: wnli" in texts[EIGHT[2]]
    assert "--master_addr=NAME" in launch(repo, "--help", launcher="train_multinode.sh").stdout


# How it ends


def ranks_that(repo: Path, actions: dict[int, str], nproc: int = 3) -> tuple[subprocess.CompletedProcess[str], float]:
    """A launch whose ranks follow a script, and the seconds from the event to the end of the launcher."""
    done = launch(
        repo, "--TASK=mrpc", f"--nproc={nproc}", launcher="train_full_8p.sh", STUB_RANKS=json.dumps(actions)
    )  # fmt: skip
    begun = max(
        file.stat().st_mtime
        for file in (repo / f"test/output/mrpc/bert-large-cased_{nproc}p_acc").glob("called.json.*")
    )
    return done, time.time() - begun - 0.5


@pytest.mark.parametrize(
    ("actions", "code", "says"),
    [
        ({1: "crash"}, 7, "rank 1 ended with exit code 1"),
        ({2: "kill", 0: "hang", 1: "hang"}, 7, "rank 2 was killed by SIGKILL"),
        ({0: "exit 6"}, 6, "rank 0 ended with exit code 6"),
        pytest.param(
            {0: "exit 7", 1: "crash", 2: "exit 7"}, 7, "rank 1 ended with exit code 1", marks=pytest.mark.slow
        ),
        pytest.param({1: "exit 5", 0: "done"}, 5, "rank 1 ended with exit code 5", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_failing_rank_ends_all_in_time_and_is_named(repo: Path, actions: dict, code: int, says: str) -> None:
    done, seconds = ranks_that(repo, actions)
    assert done.returncode == code, done.stderr
    assert seconds < 10
    rank = says.split()[1]
    lines = done.stderr.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("error:"))
    assert lines[at].startswith(f"error: {says}; the last lines of ")
    assert f"train_rank_{rank}.log" in lines[at] and "  to stdout" in lines[at + 1 :]
    if actions[int(rank)] == "crash":
        assert "  RuntimeError: a bug on purpose" in lines
    assert "Final" not in done.stdout and "ChildFailedError" not in done.stderr
    assert alive_below(repo) == []


def test_what_ranks_started_is_ended_too(repo: Path) -> None:
    done = launch(repo, "--TASK=mrpc", "--nproc=2", launcher="train_full_8p.sh", STUB_ORPHAN="1", STUB_EXIT="1")
    assert done.returncode == 7
    folder = repo / "test/output/mrpc/bert-large-cased_2p_acc"
    assert not [rank for rank in (0, 1) if is_running((folder / f"orphan.{rank}").read_text())]


def started(repo: Path, nproc: int = 2, **settings: str) -> subprocess.Popen:
    """A launch whose ranks sleep, once they all do."""
    child = subprocess.Popen(
        ["bash", str(repo / "test/train_full_8p.sh"), "--TASK=mrpc", f"--nproc={nproc}"],
        env=clean_environment(STUB_SLEEP="60", **settings),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for rank in range(nproc):
        wait_for(repo / f"test/output/mrpc/bert-large-cased_{nproc}p_acc/sleeping.{rank}", 60)
    return child


@pytest.mark.parametrize(
    ("number", "code", "stub_stop"),
    [(signal.SIGINT, 130, "130"), (signal.SIGTERM, 143, "143"), (signal.SIGTERM, 143, "0"), (signal.SIGTERM, 6, "6")],
)
def test_signals_reach_every_rank_and_their_last_words_are_logged(repo, number, code, stub_stop) -> None:
    child = started(repo, STUB_STOP=stub_stop)
    child.send_signal(number)
    errors = child.communicate(timeout=20)[1]
    assert child.returncode == code, errors
    folder = repo / "test/output/mrpc/bert-large-cased_2p_acc"
    for rank in (0, 1):
        assert (folder / f"got_signal.{rank}").read_text() == str(int(number))
        assert "saved a checkpoint" in (folder / f"train_rank_{rank}.log").read_text()
    assert alive_below(repo) == []


def test_ctrl_c_of_a_terminal_goes_to_the_launcher_and_to_each_rank_once(repo: Path) -> None:
    child = started(repo, STUB_STOP="130")
    os.killpg(child.pid, signal.SIGINT)
    child.communicate(timeout=20)
    assert child.returncode == 130


@pytest.mark.parametrize("victim", ["launcher", "torch's launcher"])
def test_kill_9_leaves_no_rank(repo: Path, victim: str) -> None:
    child = started(repo)
    if victim == "launcher":
        os.killpg(child.pid, signal.SIGKILL)
    else:
        (agent,) = [pid for pid in Path("/proc").glob("[0-9]*") if is_agent(pid, child.pid)]
        os.kill(int(agent.name), signal.SIGKILL)
        assert child.wait(timeout=20) == 7
    until = time.monotonic() + 10
    while alive_below(repo) and time.monotonic() < until:
        time.sleep(0.1)
    assert [line for line in alive_below(repo) if "run_glue" in line] == []
    child.kill()
    child.communicate()


def is_agent(process: Path, launcher: int) -> bool:
    try:
        parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
        return parent == launcher and b"torch.distributed.run" in (process / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
def test_fifty_launches_at_once_do_not_meet(repo: Path) -> None:
    command = ["bash", str(repo / "test/train_full_8p.sh"), "--TASK=mrpc", "--nproc=2"]
    launches = [
        subprocess.Popen(
            [*command, f"--output_dir={repo}/out{number}"],
            env=clean_environment(STUB_MEET="1"),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for number in range(50)
    ]  # fmt: skip
    errors = [child.communicate(timeout=550)[1] for child in launches]
    assert [child.returncode for child in launches] == [0] * 50, [e for e in errors if "error" in e]
    ports = {json.loads((repo / f"out{n}/called.json.0").read_text())["env"]["MASTER_PORT"] for n in range(50)}
    assert len(ports) == 50
    for number in range(50):
        met = [(repo / f"out{number}/met.{rank}").read_text() for rank in (0, 1)]
        assert met == [f"{repo}/out{number}"] * 2


# The verdict


def notes_of(folder: Path, *codes: int | None, cleared: tuple[int, ...] = (), late: tuple[int, ...] = ()) -> Path:
    folder.mkdir()
    for rank, code in enumerate(codes):
        note = {"rank": rank, "code": code, "is_cleared": rank in cleared, "time": float(rank in late)}
        (folder / f"{rank}.json").write_text(json.dumps(note))
    return folder


@pytest.mark.parametrize(
    ("codes", "cleared", "status", "signal_number", "expected", "says"),
    [
        ((0, 0), (), 0, 0, 0, ""),
        ((0, 0), (), 0, 15, 143, ""),
        ((143, -15), (), 1, 15, 143, ""),
        ((6, 143), (), 1, 15, 6, "rank 0 ended with exit code 6"),
        ((-15, -11, -9), (0, 2), 1, 0, 7, "rank 1 was killed by SIGSEGV"),
        ((7, 7), (), 1, 0, 7, "rank 0 ended with exit code 7"),
        ((None, None), (), -9, 0, 7, "torch's launcher ended with -9"),
        ((), (), 1, 0, 4, "no rank was started"),
        ((2, 2), (), 1, 0, 2, "rank 0 ended with exit code 2"),
        ((143, 143), (), 1, 0, 143, ""),
        ((138, -15), (1,), 1, 0, 138, ""),
        ((138, 138), (), 1, 15, 143, ""),
    ],
)
def test_verdict(tmp_path, codes, cleared, status, signal_number, expected, says) -> None:
    notes = notes_of(tmp_path / "notes", *codes, cleared=cleared)
    code, lines = verdict(notes, tmp_path, tmp_path / "none.log", status, signal_number)
    assert code == expected
    assert says in "".join(lines[:1]) and bool(lines) == bool(says)


def test_the_first_failure_is_the_cause(tmp_path: Path) -> None:
    notes = notes_of(tmp_path / "notes", 1, 1, late=(0,))
    assert verdict(notes, tmp_path, tmp_path / "none.log", 1, 0)[1][0].startswith("rank 1")


def test_the_way_to_this_host_is_one_of_its_interfaces() -> None:
    assert network_to("127.0.0.1") == ("127.0.0.1", "lo")
    command = [sys.executable, str(REPOSITORY / "bert_glue/launch/ranks.py"), "network", "no such host.invalid"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 4


def test_hosts_that_do_not_meet_are_ended_after_their_time(tmp_path: Path) -> None:
    words = (
        "import os, sys; from pathlib import Path; from bert_glue.launch.ranks import end_unless_met\n"
        "end_unless_met(Path(sys.argv[1]), 0.3); os.execvp('sleep', ['sleep', '60'])"
    )
    done = subprocess.run([sys.executable, "-c", words, str(tmp_path)], cwd=REPOSITORY, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    code, lines = verdict(tmp_path, tmp_path, tmp_path / "none.log", 137, 0)
    assert code == 7 and "within --ddp_timeout" in lines[0]


def test_hosts_that_meet_are_left_alone(tmp_path: Path) -> None:
    notes = notes_of(tmp_path / "notes", 0)
    words = (
        "import os, sys; from pathlib import Path; from bert_glue.launch.ranks import end_unless_met\n"
        "end_unless_met(Path(sys.argv[1]), 0.1); os.execvp('sleep', ['sleep', '1'])"
    )
    done = subprocess.run([sys.executable, "-c", words, str(notes)], cwd=REPOSITORY, timeout=30, check=False)
    assert done.returncode == 0
