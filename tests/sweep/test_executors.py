"""The queue over an executor of this file, the flags of clusters, and what of Ray and Slurm needs neither of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from sweep_stubs import Sweep, wait_until

from bert_glue.config.command_line import CommandParser
from bert_glue.errors import MachineError, UsageError
from bert_glue.storage.checkpoint import MANIFEST
from bert_glue.sweep.__main__ import Listed
from bert_glue.sweep.executors import choice
from bert_glue.sweep.executors.child import LOG_FILE, Order, exit_status, start, wait
from bert_glue.sweep.executors.interface import Event, EventKind, Job
from bert_glue.sweep.executors.ray import Share, share_of
from bert_glue.sweep.executors.ray_worker import (
    PIECE_BYTES,
    Kind,
    Mailbox,
    Message,
    Mirror,
    add_piece,
    files_of,
    pieces_of,
)  # fmt: skip
from bert_glue.sweep.executors.slurm import STATE_FILE, _minutes, _parameters, state_of
from bert_glue.sweep.plan import SweepRun
from bert_glue.sweep.scheduler import Queue
from bert_glue.tasks import TASKS


class Told:
    """An executor that ends each job as it was told.

    Args:
        ends: seed -> (exit code, whether its place was lost) of its attempts; None never ends. After them, all is well.
        places: jobs at once.
        outlives_driver: as in `Executor`.
    """

    where = "nowhere"

    def __init__(self, ends: dict[int, list[tuple[int | None, bool]]], places: int = 2, outlives_driver: bool = False):
        self.ends, self.places, self.outlives_driver = ends, places, outlives_driver
        self.submitted: list[list[int]] = []
        self.cancelled: list[int] = []
        self.is_gone = False
        self.held = 0

    def open(self, folder: Path) -> None:
        pass

    def free(self) -> int:
        return self.places - self.held

    def submit(self, jobs: list[Job]) -> None:
        assert len(jobs) <= self.free()
        self.submitted.append([job.run.seed for job in jobs])
        self.held += len(jobs)

    def poll(self, jobs: list[Job]) -> None:
        if self.is_gone:
            self.is_gone = False
            raise MachineError("the cluster does not answer")
        for job in jobs:
            if job.began is None:
                job.starts("a host")
                continue
            ends = self.ends.get(job.run.seed) or [(0, False)]
            code, is_lost = ends[0]
            if code is None or job.code is not None:
                continue
            ends.pop(0)
            if code == 0:
                finish(job.run)
            job.ends(code, "its host ended" if is_lost else "", is_lost)

    def cancel(self, jobs: list[Job], number: int) -> None:
        self.cancelled.append(number)
        for job in jobs:
            job.ends(-number)

    def collect(self, job: Job) -> None:
        self.held -= 1

    def leave_out(self, job: Job) -> bool:
        is_last = self.places == 1
        self.places -= not is_last
        return not is_last

    def close(self) -> None:
        pass


def finish(run: SweepRun) -> None:
    run.note_settings()
    (run.folder / "all_results.json").write_text(json.dumps({"seed": run.seed, "eval_f1": 0.5, "eval_accuracy": 0.5}))


@pytest.fixture
def runs(tmp_path: Path) -> list[SweepRun]:
    return [SweepRun(TASKS["mrpc"], seed, {}, tmp_path / f"seed{seed}", ()) for seed in range(1, 5)]


def queue_of(executor: Told, runs: list[SweepRun]) -> tuple[Queue, list[Event]]:
    events: list[Event] = []
    return Queue(Listed(runs), executor, 1.0, events.append, lambda jobs: None), events


def kinds(events: list[Event], run: SweepRun) -> list[str]:
    return [event.kind.name for event in events if run.name in event.text]


# The queue


def test_jobs_are_submitted_as_places_become_free(runs) -> None:
    executor = Told({})
    queue, events = queue_of(executor, runs)
    queue.run()
    assert executor.submitted == [[1, 2], [3, 4]] and executor.held == 0
    assert all(kinds(events, run) == ["STARTED", "DONE"] for run in runs)
    assert not queue.failures and queue.stop_signal is None


def test_a_lost_place_costs_no_attempt_and_a_failure_does(runs) -> None:
    executor = Told({1: [(-9, True), (5, False), (-9, True), (5, False)], 2: [(2, False)]})
    queue, events = queue_of(executor, runs[:2])
    queue.run()
    assert kinds(events, runs[0]) == ["STARTED", "DEVICE_LOST", "STARTED", "RETRIED"] + [
        "STARTED", "DEVICE_LOST", "STARTED", "FAILED"]  # fmt: skip
    assert kinds(events, runs[1]) == ["STARTED", "FAILED"]  # a usage error is not repeated
    assert queue.codes == {runs[0].folder: 5, runs[1].folder: 2}


def test_a_run_that_takes_its_hosts_down_is_given_up(runs) -> None:
    queue, events = queue_of(Told({1: [(-9, True)] * 20}), runs[:1])
    queue.run()
    assert kinds(events, runs[0]).count("DEVICE_LOST") == 5 and queue.codes == {runs[0].folder: 1}
    assert queue.failures[runs[0].folder] == "its host ended"


def test_a_place_that_runs_nothing_is_left_out(runs) -> None:
    executor = Told({1: [(4, False)]})
    queue, events = queue_of(executor, runs)
    queue.run()
    assert EventKind.DEVICE_LOST in [event.kind for event in events] and executor.places == 1
    assert not queue.failures and all(run.results() for run in runs)


def test_a_cluster_that_is_gone_ends_the_sweep_after_the_runs_were_told(runs) -> None:
    executor = Told({1: [(None, False)], 2: [(None, False)]})
    executor.is_gone = True
    queue, events = queue_of(executor, runs)
    with pytest.raises(MachineError, match="does not answer"):
        queue.run()
    assert executor.cancelled == [signal.SIGTERM] and executor.submitted == [[1, 2]]


@pytest.mark.parametrize("outlives", [False, True])
def test_a_signal_stops_jobs_or_leaves_those_that_go_on(runs, outlives: bool) -> None:
    executor = Told({seed: [(None, False)] for seed in range(1, 5)}, outlives_driver=outlives)
    queue, events = queue_of(executor, runs)
    shown = []

    def show(jobs: list[Job]) -> None:
        shown.append(len(jobs))
        if len(shown) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    queue.show = show
    queue.run()
    assert queue.stop_signal == signal.SIGTERM and executor.cancelled == ([] if outlives else [signal.SIGTERM])
    last = [event.kind for event in events][-1]
    assert last is (EventKind.SIGNAL if outlives else EventKind.STOPPED) and executor.submitted == [[1, 2]]


def test_jobs_that_cannot_be_submitted_do_not_end_the_sweep(runs, sweep: Sweep) -> None:
    """On the real local executor: the folder of the first run is a file."""
    sweep.output.joinpath("mrpc").mkdir(parents=True)
    sweep.folder("mrpc", 1).write_text("")
    done = sweep.run("--tasks=mrpc", "--seeds=1-3")
    assert done.returncode == 6 and "the process cannot be started" in done.stderr
    assert [run["state"] for run in sweep.summary()["runs"]] == ["failed", "done", "done"]


# Flags


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--executor", "condor"], "invalid choice: 'condor'"),
        (["--max_runs", "2"], "--max_runs needs --executor ray or slurm, not local"),
        (["--executor", "slurm", "--ray_address", "h:1"], "--ray_address needs --executor ray, not slurm"),
        (["--executor", "ray", "--max_runs", "0"], "--max_runs 0 is below the minimum of 1"),
        (["--executor", "ray", "--slurm_partition", "gpu"], "--slurm_partition needs --executor slurm, not ray"),
        (["--executor", "slurm", "--jobs", "2"], "--jobs 2: Slurm gives each run its own device"),
        (["--executor", "ray", "--jobs", "auto"], "--jobs auto: Slurm gives each run its own device, and Ray needs a"),
        (["--executor", "slurm", "--slurm_=3"], "the name of an option of sbatch follows slurm_"),
    ],
)
def test_flags_of_another_executor_are_refused(sweep: Sweep, flags: list[str], says: str) -> None:
    done = sweep.run("--devices", "auto", *flags)
    assert done.returncode == 2 and says in done.stderr and not sweep.output.exists(), done.stderr


def test_a_cluster_chooses_the_devices(sweep: Sweep) -> None:
    done = sweep.run("--devices", "npu:0,npu:1", "--executor", "ray")
    assert done.returncode == 2 and "give their kind alone, or auto" in done.stderr


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_without_its_package_one_line_names_the_extra(sweep: Sweep, tmp_path: Path, name: str, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('No module named {package}')")
    path = os.pathsep.join(filter(None, (str(tmp_path), str(sweep.root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        sweep.command("--tasks=mrpc", "--executor", name), env=sweep.environment(PYTHONPATH=path), cwd=sweep.root,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 4 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"pip install {package}" in done.stderr and f"its extra [{name}]" in done.stderr
    assert not sweep.output.exists()


def test_settings_of_slurm_are_any_option_of_sbatch() -> None:
    words = ["--tasks", "mrpc", "--slurm_partition", "gpu", "--slurm-gres=npu:1", "--slurm_exclusive", "--seeds", "1"]
    rest, settings = choice.without_slurm_settings(words)
    assert rest == ["--tasks", "mrpc", "--seeds", "1"]
    assert settings == {"partition": "gpu", "gres": "npu:1", "exclusive": ""}
    found = _parameters({**settings, "array_parallelism": "4", "srun_args": "--mpi none"})
    assert (found["array_parallelism"], found["srun_args"]) == (4, ["--mpi", "none"])
    more = found["additional_parameters"]
    assert (more["partition"], more["gres"], more["exclusive"], more["requeue"]) == ("gpu", "npu:1", True, True)


@pytest.mark.parametrize(("text", "minutes"), [("90", 90), ("1:30:00", 90), ("04:00:01", 241)])
def test_a_time_limit_is_minutes_or_what_slurm_writes(text: str, minutes: int) -> None:
    assert _minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "a day", "1:30", "-5"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--slurm_time"):
        _minutes(text)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"nodes": "2"}, "--slurm_nodes cannot be given"), ({"array_parallelism": "many"}, "not a number")],
)
def test_settings_that_the_sweep_makes_are_refused(settings: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        _parameters(settings)


def test_the_help_names_every_flag_of_clusters() -> None:
    parser = CommandParser(prog="x")
    choice.add_flags(parser)
    text = parser.format_help()
    assert all(word in text for word in ("--executor", "--ray_address", "--max_runs", "--slurm_NAME"))


# What a run takes of a node


NODES = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 16.0}]


def test_a_run_has_a_device_and_its_part_of_the_cores() -> None:
    share = share_of(NODES, "auto", 1, None)
    assert (share.kind, share.options()) == ("cuda", {"num_cpus": 2, "num_gpus": 1.0})
    assert [share.fit(node) for node in NODES] == [4, 1, 0]
    assert share_of(NODES, "cuda", 2, None).options() == {"num_cpus": 1, "num_gpus": 0.5}
    assert share_of([{"CPU": 192.0, "NPU": 8.0}], "auto", 1, None).options() == {
        "num_cpus": 24, "resources": {"NPU": 1.0}}  # fmt: skip


def test_without_devices_the_cores_of_a_node_are_one() -> None:
    share = share_of(NODES, "cpu", 1, None)
    assert share == Share("cpu", "CPU", 0.0, 4) and [share.fit(node) for node in NODES] == [2, 1, 4]
    assert share_of(NODES, "cpu", 2, None).cores == 2 and share_of(NODES, "cpu", 1, 16).fit(NODES[0]) == 0
    assert str(share) == "4 cores" and str(share_of(NODES, "cuda", 1, 1)) == "1 GPU and 1 core"


def test_devices_that_no_node_has_are_named() -> None:
    with pytest.raises(MachineError, match="the cluster has no NPU; it has 3 nodes with 5 GPU, 28 CPU"):
        share_of(NODES, "npu", 1, None)
    with pytest.raises(UsageError, match="choose npu, cuda, cpu or auto"):
        share_of(NODES, "mps", 1, None)


# What runs on a node


class Letters:
    """A post whose messages stay here."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def send(self, kind: Kind, **content) -> None:
        self.sent.append(Message("key", kind, **content))

    def kinds(self) -> list[Kind]:
        return [message.kind for message in self.sent]


def checkpoint(folder: Path, step: int, size: int = 10) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / MANIFEST).write_text("{}")
    (made / "model.safetensors").write_bytes(os.urandom(size))
    return made


def test_a_folder_that_is_not_shared_arrives_whole(tmp_path: Path) -> None:
    folder, there, post = tmp_path / "run", tmp_path / "sweep", Letters()
    checkpoint(folder, 2)  # came from the sweep
    mirror = Mirror(folder, post, 1 << 30)
    checkpoint(folder, 3, 2 * PIECE_BYTES + 5)
    (folder / LOG_FILE).write_text("one line\n")
    (folder / "adapter").mkdir()
    (folder / "adapter/a.json").write_text("{}")
    for name in ("sweep_run.json", ".lock", "empty.txt"):
        (folder / name).touch()
    mirror.update()
    assert mirror.finish(0) == 0
    for message in post.sent:
        if message.kind is Kind.FILE:
            add_piece(there, message.path, message.data)
    arrived = {file.relative_to(there).as_posix() for file in files_of(there)}
    assert arrived == {"checkpoint-3/manifest.json", "checkpoint-3/model.safetensors", "adapter/a.json", "empty.txt"}
    assert all((there / name).read_bytes() == (folder / name).read_bytes() for name in arrived)
    assert b"".join(m.data for m in post.sent if m.kind is Kind.LOG) == b"one line\n"
    paths = [message.path for message in post.sent if message.path.startswith("checkpoint")]
    assert paths[-1] == "checkpoint-3/manifest.json" and paths.count("checkpoint-3/model.safetensors") == 3
    assert [m.names for m in post.sent if m.kind is Kind.CHECKPOINTS] == [("checkpoint-2", "checkpoint-3")]


def test_more_than_the_bound_is_not_sent_and_said(tmp_path: Path) -> None:
    post = Letters()
    (tmp_path / LOG_FILE).touch()
    mirror = Mirror(tmp_path, post, 1 << 20)
    checkpoint(tmp_path, 1, 2 << 20)
    mirror.update()
    (note,) = [message.text for message in post.sent if message.kind is Kind.NOTE]
    assert "checkpoint-1 has 2 MiB and is not copied (--ray_collect_mib)" in note and Kind.FILE not in post.kinds()
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    assert mirror.finish(0) == 6 and "the results have 3 MiB" in post.sent[-1].text


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    for path in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(ValueError, match="leads out"):
            add_piece(tmp_path, path, b"")


def test_a_full_mailbox_takes_no_more_until_it_is_read() -> None:
    mailbox = Mailbox()
    large = Message("a", Kind.FILE, data=bytes(40 << 20))
    assert mailbox.exchange("a", [large]) == (True, [])
    mailbox.send("b", signal.SIGTERM)
    assert mailbox.exchange("a", [large]) == (False, [])
    assert mailbox.exchange("b", []) == (True, [signal.SIGTERM]) and mailbox.exchange("b", []) == (True, [])
    assert mailbox.take() == [large] and mailbox.exchange("a", [large])[0]


def test_pieces_of_files(tmp_path: Path) -> None:
    file = tmp_path / "x"
    for size in (0, 1, PIECE_BYTES, PIECE_BYTES + 1):
        file.write_bytes(bytes(size))
        found = list(pieces_of(file))
        assert sum(len(data) for data, _ in found) == size
        assert [is_last for _, is_last in found] == [False] * (len(found) - 1) + [True]


def test_the_state_of_another_job_is_none(tmp_path: Path) -> None:
    assert state_of(tmp_path, "12_0") is None
    (tmp_path / STATE_FILE).write_text('{"job": "12_0", "state": "running"}')
    assert state_of(tmp_path, "12_0")["state"] == "running" and state_of(tmp_path, "12_1") is None


def test_the_exit_code_of_a_child_is_read_without_reaping_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bert_glue.sweep.executors.child.RUN_GLUE", tmp_path / "sleep.py")
    (tmp_path / "sleep.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as in Ray's workers
    try:
        process = start(Order(tmp_path, (), "cpu", 1, False), {"SETTING": "1"})
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    assert exit_status(process.pid) is None and wait(process, 0.3) is None
    wait_until(lambda: "here" in (tmp_path / LOG_FILE).read_text())
    process.send_signal(signal.SIGINT)
    assert wait(process, 20) == -signal.SIGINT == exit_status(process.pid)
    assert process.wait() == -signal.SIGINT
