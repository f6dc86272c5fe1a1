"""The place of this process among the ranks of its run, from what torchrun, srun or mpirun set in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from bert_glue.errors import UsageError


class ClusterResources(NamedTuple):
    """What schedulers of clusters call devices.

    Args:
        by_kind: the kind of a device -> its name as a resource of Ray, the best kind first.
        gpu: the resource that Ray has an option of its own for.
    """

    by_kind: dict[str, str]
    gpu: str


CLUSTER_RESOURCES = ClusterResources({"npu": "NPU", "cuda": "GPU", "cpu": "CPU"}, "GPU")


class RankEnvironment(NamedTuple):
    """The place of this process in a run: `rank` of `world_size`, and `local_rank` on its host.

    Ranks meet at `address`:`port`, of the host of rank 0; "" and 0 for a process alone.
    """

    rank: int
    local_rank: int
    world_size: int
    address: str = ""
    port: int = 0

    def variables(self) -> dict[str, str]:
        """The place as the variables of torchrun, which accelerate and torch read. {} for a process alone."""
        if self.world_size == 1:
            return {}
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        return dict(zip(names, map(str, self), strict=True))


class _Launcher(NamedTuple):
    """Names of the variables in which a launcher tells a process its place, and how to run it alone."""

    world: str
    rank: str
    local_rank: str
    advice: str
    hosts: str = ""  # how many hosts the ranks are on, or how many ranks are on this host
    is_one_host: str = ""  # the variable whose value `hosts` has if all ranks are on one host; "": that value is 1


_ALONE = "{} started this process as one of several ranks; to run each alone, set WORLD_SIZE=1"
_TORCHRUN = _Launcher(
    "WORLD_SIZE", "RANK", "LOCAL_RANK",
    "without WORLD_SIZE a process runs alone; torchrun and test/train_full_8p.sh set all of these",
)  # fmt: skip
_SRUN = _Launcher(
    # Not SLURM_NTASKS: a job's batch script has that too, and it is one process.
    "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", _ALONE.format("srun"), "SLURM_STEP_NUM_NODES",
)  # fmt: skip
# An mpirun inside a Slurm job starts its helpers by srun, so its own variables go first.
_LAUNCHERS = (
    _Launcher(
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", _ALONE.format("mpirun"),
        "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE",
    ),
    _Launcher("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", _ALONE.format("mpirun"), "MPI_LOCALNRANKS", "PMI_SIZE"),
    _SRUN,
)  # fmt: skip
_FIRST_PORT, _PORTS = 15000, 15000  # below the ports that a kernel gives to outgoing connections, from 32768


def read_rank_environment(environment: Mapping[str, str]) -> RankEnvironment:
    """Read torchrun's variables; without WORLD_SIZE, those of mpirun or srun.

    A single process is rank 0 whatever RANK and LOCAL_RANK are, so that stale variables cannot change `--device npu:3`.
    The reference sets RANK but not LOCAL_RANK, which is the same on its single host.

    Raises:
        UsageError: a variable is missing or has no valid value; one line each.
    """
    launcher = _launcher_of(environment)
    wrong: list[str] = []

    def number(name: str, default: int | None, least: int, end: int | None = None) -> int:
        text = environment.get(name, "" if default is None else str(default))
        if text.isdecimal() and int(text) >= least and (end is None or int(text) < end):
            return int(text)
        bounds = f"in [{least}, {'inf' if end is None else end})"
        wrong.append(f"{name}={text or '(not set)'} in the environment: it must be a whole number {bounds}")
        return least

    world = number(launcher.world, 1, 1)
    rank, local, address, port = 0, 0, "", 0
    if world > 1:
        rank = number(launcher.rank, None, 0, world)
        local = number(launcher.local_rank, rank, 0, world)
        address = environment.get("MASTER_ADDR") or _first_host(launcher, environment)
        if not address:
            wrong.append("MASTER_ADDR=(not set) in the environment: the address of rank 0's host is needed")
        port = number("MASTER_PORT", _port_of_job(environment) if launcher is _SRUN else None, 1, 65536)
    if wrong:
        raise UsageError("\n".join([*wrong, launcher.advice]))
    return RankEnvironment(rank, local, world, address, port)


def _launcher_of(environment: Mapping[str, str]) -> _Launcher:
    """The launcher that started this process; torchrun's variables go before all others, because they can be set."""
    if "WORLD_SIZE" not in environment:
        for launcher in _LAUNCHERS:
            if all(name in environment for name in (launcher.world, launcher.rank, launcher.local_rank)):
                return launcher
    return _TORCHRUN


def _first_host(launcher: _Launcher, environment: Mapping[str, str]) -> str:
    """The host of rank 0 as far as the launcher tells it, else ""."""
    if launcher is _TORCHRUN:
        return ""
    one = environment.get(launcher.is_one_host) if launcher.is_one_host else "1"
    if environment.get(launcher.hosts) == one:
        return "127.0.0.1"
    return first_of_node_list(environment.get("SLURM_STEP_NODELIST", "")) if launcher is _SRUN else ""


def first_of_node_list(nodes: str) -> str:
    """The first host of a Slurm node list: gpu01 of "gpu[01-04,07],login1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _port_of_job(environment: Mapping[str, str]) -> int | None:
    """A port that all tasks of a job step derive alike, and other steps and jobs hardly ever; None outside Slurm."""
    job, step = (environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if not (job.isdecimal() and step.isdecimal()):
        return None
    return _FIRST_PORT + (7 * int(job) + int(step)) % _PORTS
