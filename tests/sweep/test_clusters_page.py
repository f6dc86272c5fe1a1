"""docs/clusters.md: each command of the page parses, and runs as its comment says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from sweep_stubs import REPOSITORY, Sweep

PAGE = REPOSITORY / "docs/clusters.md"
LINES_OF_A_WAY = 10
ELSEWHERE = {"kubectl": "tests/launch/test_kubernetes.py", "sbatch": "tests/launch/test_hosts.py"}


def commands() -> list[tuple[str, str]]:
    """(comment, command) of each command of the page."""
    found, comment = [], ""
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("#"):
                comment = line
            else:
                found.append((comment, line))
    return found


COMMANDS = commands()
SWEEPS = [command for _, command in COMMANDS if command.startswith("bert-glue sweep ")]


def runs(sweep: Sweep, command: str, *more: str) -> str:
    """The output of a command of the page, over the stub."""
    words = shlex.split(command)[2:]
    done = sweep.run(*words, *more, "--output_dir", str(sweep.output))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_ray(sweep: Sweep, command: str) -> None:
    pytest.importorskip("ray")
    assert "Ray, 1 nodes" in runs(sweep, command, "--devices", "cpu", "--ray_cores", "1")


def on_two_nodes(sweep: Sweep, command: str) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        cluster.add_node(**small)
        place = command.replace("HEAD:6379", cluster.address)
        assert "Ray, 2 nodes, 2 runs at once" in runs(sweep, place, "--devices", "cpu")
    finally:
        cluster.shutdown()


def as_jobs(sweep: Sweep, command: str) -> None:
    pytest.importorskip("submitit")
    assert "this host, at most 1000 runs at once" in runs(sweep, command, "--devices", "cpu")


def here(sweep: Sweep, command: str) -> None:
    assert "done rte seed 3" in runs(sweep, command, "--devices", "cpu")


# What a command has -> how it is run here. The longest that fits is taken.
WAYS: dict[str, Callable[[Sweep, str], None]] = {
    "--sample": here,
    "--executor ray --sample": on_ray,
    "--executor ray --ray_address HEAD:6379": on_two_nodes,
    "--executor slurm --slurm_cluster local": as_jobs,
}


def way_of(command: str) -> Callable[[Sweep, str], None] | None:
    return WAYS.get(max((part for part in WAYS if part in command), key=len, default=""))


def test_each_command_says_whether_it_is_run() -> None:
    assert len(COMMANDS) == 9
    for comment, command in COMMANDS:
        assert comment.startswith(("# run by a test", "# not run here: needs ")), command
        is_elsewhere = command.split()[0] in ELSEWHERE
        is_run = comment.startswith("# run by")
        assert is_elsewhere or is_run == (way_of(command) is not None), command
    assert all((REPOSITORY / file).is_file() for file in ELSEWHERE.values())
    files = {word for _, command in COMMANDS for word in command.split() if word.startswith("deploy/")}
    assert len(files) == 3 and all((REPOSITORY / file).is_file() for file in files)


def test_each_way_is_short() -> None:
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        assert len(block.splitlines()) <= LINES_OF_A_WAY


@pytest.mark.parametrize("command", SWEEPS)
def test_each_sweep_parses(sweep: Sweep, command: str) -> None:
    done = sweep.run(*shlex.split(command)[2:], "--devices", "auto", "--dry_run")
    assert done.returncode == 0 and "to start: " in done.stdout, done.stderr


SLOW = [
    pytest.param(command, marks=() if way_of(command) is here else pytest.mark.slow)
    for command in SWEEPS
    if way_of(command)
]


@pytest.mark.parametrize("command", SLOW)
def test_it_runs(sweep: Sweep, command: str) -> None:
    way = way_of(command)
    assert way is not None
    way(sweep, command)
    assert json.loads((sweep.output / "summary.json").read_text())["groups"]
    assert list(Path(sweep.output).glob("*/seed3/all_results.json"))
