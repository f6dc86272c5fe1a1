"""`--executor ray` on Ray's own cluster utility: two nodes on one machine, nodes and drivers that die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sweep_stubs import REPOSITORY, Sweep, outcome, real_command, wait_until

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

RAY = ("--devices", "cpu", "--executor", "ray")
# For the Ray that the tests start: no usage statistics; and no niceness and time to start, for a machine that is busy.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "120"}


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A head with one core and a second node with one core."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    found = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        found.second = found.add_node(**small)
        yield found
    finally:
        found.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes that live through all tests that take them."""
    with two_nodes() as found:
        yield found


# A sweep that is told that the nodes share nothing, although they are on one machine.
APART = """
import sys
from bert_glue.sweep import __main__ as sweep
from bert_glue.sweep.executors.ray import RayExecutor
look = RayExecutor._look_around
RayExecutor._look_around = lambda *given: [False for _ in look(*given)]
sys.exit(sweep.main(sys.argv[1:]))
"""
# How processes of real sweeps are started; each run takes one thread.
REAL = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": REPOSITORY, "text": True}


def apart(command: list[str]) -> list[str]:
    """The same sweep, told that the nodes share nothing."""
    return [command[0], "-c", APART, *command[3:]]


def long_runs(output: Path, address: str, seeds: str) -> list[str]:
    """A sweep of runs that are long enough to die between two checkpoints, on nodes that share nothing."""
    return apart(
        real_command(
            output, *RAY, "--ray_address", address, "--tasks", "wnli", "--seeds", seeds,
            "--", "--num_train_epochs", "12", "--max_train_samples", "400", "--logging_steps", "1",
        )
    )  # fmt: skip


def test_ray_is_started_here_and_ended(sweep: Sweep) -> None:
    sweep.stub = {"mrpc-2": {"exit": [5]}}
    done = sweep.run("--tasks=mrpc", "--seeds=1-3", *RAY, "--ray_cores", "1", RAY_ADDRESS="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray, 1 nodes" in done.stdout and "runs at once with 1 core each" in done.stdout
    assert done.stdout.count("done mrpc") == 3 and "it will be retried once" in done.stdout
    assert "usage stats" not in (done.stdout + done.stderr).lower()
    assert sweep.attempts("mrpc", 1)[0]["threads"] == "1" and "--device=cpu" in sweep.attempts("mrpc", 1)[0]["argv"]


def test_a_search_runs_on_the_cluster(sweep: Sweep, cluster) -> None:
    pytest.importorskip("optuna")
    flags = ("--tasks=mrpc", "--seeds=1,2", "--search", "3", *RAY, "--ray_address", cluster.address)
    done = sweep.run(*flags)
    assert done.returncode == 0 and "best of 3 trials" in done.stdout, done.stderr
    assert sweep.summary()["search"]["mrpc"]["COMPLETE"] == 3
    assert "best of 3 trials" in sweep.run(*flags).stdout


def test_a_signal_lets_runs_save_and_a_killed_driver_goes_on(sweep: Sweep, cluster) -> None:
    sweep.stub = {f"mrpc-{seed}": {"steps": 80} for seed in (1, 2)}
    flags = ("--tasks=mrpc", "--seeds=1-3", *RAY, "--ray_address", cluster.address)
    steps = [sweep.folder("mrpc", seed) / "step" for seed in (1, 2)]

    def started() -> bool:
        return all(step.exists() and int(step.read_text() or 0) >= 5 for step in steps)

    child = sweep.start(*flags)
    wait_until(started, 60)
    second = sweep.run("--tasks=mrpc", "--seeds=3", *RAY, "--ray_address", cluster.address)
    assert second.returncode == 6 and "another run" in second.stderr
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 143 and out.count("(exit code 143)") == 2, out + err
    child = sweep.start(*flags)
    wait_until(lambda: all(len(sweep.attempts("mrpc", seed)) == 2 for seed in (1, 2)), 60)
    child.kill()
    child.wait()
    done = sweep.run(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(sweep.results("mrpc", seed)["resumed_at"] > 5 for seed in (1, 2))


def test_a_request_that_no_node_meets_is_refused_first(sweep: Sweep, cluster) -> None:
    at = ("--tasks=mrpc", "--seeds=1", "--ray_address", cluster.address, "--executor", "ray")
    for flags, says in (
        (("--devices", "npu"), "the cluster has no NPU; it has 2 nodes with 2 CPU"),
        (("--devices", "cpu", "--ray_cores", "64"), "no node has 64 cores for one run"),
        (("--devices", "cpu", "--max_runs", "9"), "which hold 2 runs of 1 core each"),
    ):
        done = sweep.run(*at, *flags)
        assert done.returncode == 4 and says in done.stderr, done.stderr
        assert not list(sweep.output.glob("mrpc/*"))


def test_an_address_that_does_not_answer_is_bounded(sweep: Sweep) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = sweep.run("--tasks=mrpc", "--seeds=1", *RAY, "--ray_address", address, "--ray_timeout", "5")
    assert done.returncode == 4 and f"{address}: no Ray cluster answers within 5 s" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = sweep.run("--tasks=mrpc", "--seeds=1", *RAY, RAY_ADDRESS="ray://here:10001")
    assert done.returncode == 2 and "give HOST:PORT" in done.stderr


def test_a_node_whose_devices_fail_gets_no_more_runs(sweep: Sweep, cluster) -> None:
    sweep.stub = {"mrpc-1": {"exit": [4]}, "mrpc-2": {"steps": 60}}
    done = sweep.run("--tasks=mrpc", "--seeds=1-4", *RAY, "--ray_address", cluster.address)
    assert done.returncode == 0 and done.stdout.count("done mrpc") == 4, done.stdout + done.stderr
    assert done.stdout.count("no more runs on ") == 1
    bad, good = (attempt["raylet"] for attempt in sweep.attempts("mrpc", 1))
    assert None not in (bad, good) and bad != good
    later = [attempt["raylet"] for seed in (2, 3, 4) for attempt in sweep.attempts("mrpc", seed)]
    assert later == [good] * 3


def test_outputs_are_copied_from_nodes_that_share_no_folder(sweep: Sweep, cluster) -> None:
    sweep.stub = {"mrpc-1": {"steps": 60}}
    command = apart(sweep.command("--tasks=mrpc", "--seeds=1-3", *RAY, "--ray_address", cluster.address))
    done = subprocess.run(command, env=sweep.environment(), cwd=sweep.root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "outputs are copied here, up to 4096 MiB a run" in done.stdout
    assert all(sweep.results("mrpc", seed)["seed"] == seed for seed in (1, 2, 3))
    argv = sweep.attempts("mrpc", 1)[0]["argv"]
    assert not any(word == f"--output_dir={sweep.folder('mrpc', 1)}" for word in argv)
    assert "$ " in (sweep.folder("mrpc", 1) / "run.log").read_text()


def test_a_copied_checkpoint_continues_a_run_on_another_node(tmp_path: Path, cluster) -> None:
    """A real run. The driver is killed, so that the node's own folder is lost."""
    command = long_runs(tmp_path, cluster.address, "1")
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **REAL)
    wait_until(lambda: list(tmp_path.glob("wnli/seed1/checkpoint-*/manifest.json")), 240)
    child.kill()
    child.wait()
    done = subprocess.run(command, capture_output=True, timeout=600, **REAL)
    log = (tmp_path / "wnli/seed1/run.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after step" in log and "epoch=12" in log
    assert not list(tmp_path.glob("wnli/seed1/.incoming")) and (tmp_path / "wnli/seed1/model.safetensors").is_file()


def test_a_node_that_dies_where_outputs_are_copied_costs_only_steps(tmp_path: Path) -> None:
    """Two real runs, one a node. The checkpoint of the lost node has come to the driver, from where it is sent on."""
    with two_nodes() as cluster:
        command = long_runs(tmp_path, cluster.address, "1,2")
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **REAL)
        folders = [tmp_path / f"wnli/seed{seed}" for seed in (1, 2)]
        wait_until(lambda: all(list(folder.glob("checkpoint-*/manifest.json")) for folder in folders), 300)
        assert not list(tmp_path.glob("wnli/seed*/all_results.json"))
        cluster.remove_node(cluster.second, allow_graceful=False)
        out, err = child.communicate(timeout=900)
    assert child.returncode == 0, out + err
    assert out.count("; it will be continued") == 1 and out.count("done wnli") == 2
    logs = [(folder / "run.log").read_text() for folder in folders]
    assert sum("resumed after step" in log for log in logs) == 1 and all("epoch=12" in log for log in logs)


def test_eighteen_runs_with_a_node_that_dies_equal_those_of_the_local_queue(tmp_path: Path) -> None:
    more = ("--tasks", "wnli,rte,mrpc", "--seeds", "1-6", "--", "--num_train_epochs", "3", "--max_train_samples", "96",
            "--logging_steps", "1")  # fmt: skip
    here, there = tmp_path / "here", tmp_path / "there"
    subprocess.run(
        real_command(here, "--devices", "cpu", "--jobs", "2", *more), check=True, capture_output=True, **REAL
    )
    with two_nodes() as cluster:
        child = subprocess.Popen(
            real_command(there, *RAY, "--ray_address", cluster.address, *more),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **REAL,
        )  # fmt: skip
        wait_until(lambda: len(list(there.glob("*/*/all_results.json"))) >= 3, 600)
        logs = [file for file in there.glob("*/*/run.log") if not file.with_name("all_results.json").exists()]
        wait_until(lambda: any("epoch=1." in log.read_text() for log in logs), 240)
        cluster.remove_node(cluster.second, allow_graceful=False)
        out, err = child.communicate(timeout=1800)
    assert child.returncode == 0, out + err
    assert "; it will be continued" in out and out.count("done ") == 18
    assert len(outcome(here)) == 18 and outcome(there) == outcome(here)
    tables = [json.loads((folder / "summary.json").read_text())["groups"] for folder in (here, there)]
    same = [[{k: v for k, v in row.items() if k != "samples_per_second"} for row in table] for table in tables]
    assert same[0] == same[1]
