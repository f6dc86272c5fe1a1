"""`--executor ray`: each run is a task of Ray with its own devices and cores, on a cluster's nodes or on this host.

The sweep connects to a cluster (`--ray_address`, RAY_ADDRESS), or starts Ray here, without usage statistics and without
a dashboard. A node that dies costs its runs the steps since their last checkpoint: they are submitted again.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_glue import __version__
from bert_glue.devices.rank_environment import CLUSTER_RESOURCES
from bert_glue.errors import CheckpointError, MachineError, UsageError, first_line
from bert_glue.storage.checkpoint import list_checkpoints, remove, step_of
from bert_glue.storage.files import open_own
from bert_glue.sweep.executors.child import LOG_FILE, missing, order_of, prepare
from bert_glue.sweep.executors.interface import EventKind, Job
from bert_glue.sweep.executors.ray_worker import (
    Kind,
    Mailbox,
    Message,
    Post,
    add_piece,
    files_of,
    look_around,
    pieces_of,
    run_order,
)  # fmt: skip
from bert_glue.sweep.side_by_side import AUTO

_HERE = "local"
_CORES = "CPU"
_STORE_BYTES = 256 << 20  # of Ray's object store, where Ray is started here; only signals and notes travel then
_LOOK_SECONDS, _COUNT_SECONDS = 0.5, 2.0
_KILLED_SECONDS = 10.0
_INCOMING = ".incoming"
_RAYS_SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns that its default will change
    # Where Ray is started here: if the sweep is killed, its runs get SIGTERM and save. Ray would kill them.
    "RAY_kill_child_processes_on_worker_exit": "false",
    "RAY_worker_niceness": "0",  # 15 by default, which starves runs where other programs compute
}
# Settings of the user that a run must have wherever it runs.
_PASSED_ON = ("HF_", "BERT_GLUE_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "MKL_", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Share:
    """What one run takes of a node.

    Args:
        kind: the kind of device, as in `--device`.
        resource: what Ray calls it.
        devices: how many, a fraction if runs share a device; 0 where the cores are the device.
        cores: cores.
    """

    kind: str
    resource: str
    devices: float
    cores: int

    def fit(self, node: dict[str, float]) -> int:
        """How many runs a node holds, by its resources in Ray."""
        limits = [node.get(_CORES, 0) / self.cores] if self.cores else []
        if self.devices:
            limits.append(node.get(self.resource, 0) / self.devices)
        return math.floor(min(limits) + 1e-6)

    def options(self) -> dict[str, Any]:
        """The resources as Ray's options of a task."""
        if not self.devices:
            return {"num_cpus": self.cores}
        if self.resource == CLUSTER_RESOURCES.gpu:
            return {"num_cpus": self.cores, "num_gpus": self.devices}
        return {"num_cpus": self.cores, "resources": {self.resource: self.devices}}

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' * (self.cores != 1)}"
        return f"{self.devices:g} {self.resource} and {cores}" if self.devices else cores


def share_of(nodes: list[dict[str, float]], device: str, jobs: int, cores: int | None) -> Share:
    """What a run takes of nodes with these resources.

    Args:
        device: a kind, or "auto" for the best kind that there is.
        jobs: runs that share a device. Where the cores are the device, runs that share a node.
        cores: cores of a run; None: the smallest share of a node.

    Raises:
        UsageError: no cluster can have such devices.
        MachineError: the nodes have none.
    """
    known = CLUSTER_RESOURCES.by_kind
    names = [device] if device != AUTO else list(known)
    if names[0] not in known:
        raise UsageError(f"--devices {device}: choose {', '.join(known)} or auto for --executor ray")
    for kind in names:
        resource = known[kind]
        having = [node for node in nodes if node.get(resource, 0) > 0]
        if having:
            is_cores = resource == _CORES
            counts = [jobs if is_cores else node[resource] * jobs for node in having]
            least = min(int(node.get(_CORES, 0) / count) for node, count in zip(having, counts, strict=True))
            return Share(kind, resource, 0.0 if is_cores else 1 / jobs, cores or (max(1, least) if is_cores else least))
    raise MachineError(f"--devices {device}: the cluster has no {known[names[0]]}; it has {_inventory(nodes)}")


def _inventory(nodes: list[dict[str, float]]) -> str:
    names = dict.fromkeys([*CLUSTER_RESOURCES.by_kind.values()])
    found = {name: sum(node.get(name, 0) for node in nodes) for name in names}
    return f"{len(nodes)} nodes with " + (", ".join(f"{n:g} {name}" for name, n in found.items() if n) or "no devices")


@dataclass
class _Task:
    """A task of Ray: its key in the mailbox and the reference of its result."""

    key: str
    reference: Any
    node: str = ""


class RayExecutor:
    """Tasks of Ray. See `Executor`.

    Args:
        address: of the cluster; None: RAY_ADDRESS, or else Ray is started here.
        seconds: bound of each answer of the cluster.
        device: the kind of device of a run, or auto.
        jobs_per_device: runs that share a device.
        cores: cores of a run; None: its share of a node.
        most: runs at once; None: what the nodes hold.
        grace: seconds that a run has to save.
        collected_bytes: most that is copied of one run where nodes do not share the output folder.

    Raises:
        MachineError: Ray is not installed.
    """

    outlives_driver = False

    def __init__(
        self, *, address: str | None, seconds: float, device: str, jobs_per_device: int, cores: int | None,
        most: int | None, grace: float, collected_bytes: int,
    ):  # fmt: skip
        os.environ.update({**_RAYS_SETTINGS, **os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
        try:
            import ray
        except ImportError as error:
            raise missing("ray", "ray", error) from error
        self._ray, self._seconds, self._device, self._jobs = ray, seconds, device, jobs_per_device
        self._address = address or os.environ.get("RAY_ADDRESS") or _HERE
        self._cores, self._most, self._grace, self._collected = cores, most, grace, collected_bytes
        self._active: list[Job] = []
        self._good_nodes: set[str] = set()
        self._bad_nodes: set[str] = set()
        self._next_look = self._next_count = 0.0
        self._room, self._empty_since = 0, None
        self.where = "Ray"

    def open(self, folder: Path) -> None:
        """Connects, or starts Ray; finds out what the nodes have, and whether they see `folder`."""
        self._connect()
        nodes = self._nodes()
        self._share = share_of([node["Resources"] for node in nodes], self._device, self._jobs, self._cores)
        self._room = sum(self._share.fit(node["Resources"]) for node in nodes)
        has = f"the cluster has {_inventory([node['Resources'] for node in nodes])}"
        if not self._room:
            raise MachineError(f"--executor ray: no node has {self._share} for one run; {has}")
        if self._most and self._most > self._room:
            raise MachineError(f"--max_runs {self._most}: {has}, which hold {self._room} runs of {self._share} each")
        affinity = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        here = affinity(self._ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = self._ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        self._is_shared = all(list(self._look_around(nodes, folder, affinity)))  # of every node, for its errors
        at_once = min(self._most or self._room, self._room)
        self.where = f"Ray, {len(nodes)} nodes, {at_once} runs at once with {self._share} each"
        if not self._is_shared:
            self.where += (
                f"; the nodes do not share {folder}: outputs are copied here, up to {self._collected >> 20} MiB a run"
            )

    def _connect(self) -> None:
        settings: dict[str, Any] = {"address": self._address, "log_to_driver": False, "logging_level": "ERROR"}
        if "://" in self._address:
            raise UsageError(
                f"--ray_address {self._address}: give HOST:PORT and start the sweep on a node, or with `ray job submit`"
            )
        if self._address == _HERE:
            settings |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
        elif self._address != AUTO:
            self._check_answer()
        try:
            self._ray.init(**settings)
        except Exception as error:  # Ray raises many kinds
            raise MachineError(f"--executor ray: {self._address}: {first_line(error)}") from error

    def _check_answer(self) -> None:
        """Asks the cluster in a process of its own, because Ray's calls wait in C++ code without a bound."""
        command = [sys.executable, "-c", "import sys, ray; ray.init(address=sys.argv[1])", self._address]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self._seconds)
        except subprocess.TimeoutExpired:
            done = None
        if done is None or done.returncode:
            raise MachineError(
                f"--ray_address {self._address}: no Ray cluster answers within {self._seconds:g} s (--ray_timeout)"
            )

    def _nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive and have not been left out."""
        return [node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in self._bad_nodes]

    def _look_around(self, nodes: list[dict[str, Any]], folder: Path, affinity: Any) -> Iterator[bool]:
        """Whether each node sees the output folder.

        Raises:
            MachineError: a node cannot import this package, has another version of it, or does not answer.
        """
        token = Path.cwd() / folder / f".ray_{uuid.uuid4().hex}"
        token.touch()
        look = self._ray.remote(num_cpus=0, max_retries=0)(look_around)
        places = [affinity(node["NodeID"], soft=False) for node in nodes]
        answers = [look.options(scheduling_strategy=place).remote(str(token)) for place in places]
        try:
            for node, answer in zip(nodes, answers, strict=True):
                name = f"--executor ray: node {node['NodeManagerAddress']}"
                try:
                    _, is_shared, version = self._ray.get(answer, timeout=self._seconds)
                except Exception as error:
                    raise MachineError(f"{name} cannot run bert_glue: {first_line(error)}") from error
                if version != __version__:
                    raise MachineError(f"{name} has bert_glue {version}, this host has {__version__}")
                yield is_shared
        finally:
            token.unlink(missing_ok=True)

    def free(self) -> int:
        """What the nodes hold now, less the runs that they have."""
        if time.monotonic() >= self._next_count:
            self._next_count = time.monotonic() + _COUNT_SECONDS
            self._room = sum(self._share.fit(node["Resources"]) for node in self._nodes())
        self._empty_since = None if self._room or self._active else self._empty_since or time.monotonic()
        if self._empty_since and time.monotonic() - self._empty_since > self._seconds:
            raise MachineError(f"--executor ray: no node that holds a run is left since {self._seconds:g} s")
        return min(self._most or self._room, self._room) - len(self._active)

    def submit(self, jobs: list[Job]) -> None:
        """Submits one task per job."""
        settings = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        threads = 0 if "OMP_NUM_THREADS" in settings else self._share.cores
        options = {**self._share.options(), "max_retries": 0, "name": "bert_glue run"}
        if self._bad_nodes:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self._bad_nodes))})"}
        task = self._ray.remote(run_order).options(**options)
        for job in jobs:
            self._active.append(job)
            try:
                prepare(job.run)
                sent = None if self._is_shared else self._send_checkpoints(job.run.folder)
            except OSError as error:
                job.ends(CheckpointError.exit_code, f"the run cannot be submitted: {error}")
                continue
            key = uuid.uuid4().hex
            order = order_of(job.run, self._share.kind, threads, job.is_resumed)
            post = Post(self._mailbox, key)
            job.handle = _Task(key, task.remote(order, post, settings, self._grace, self._collected, sent))

    def _send_checkpoints(self, folder: Path) -> list[tuple[str, Any]]:
        """The checkpoints that this host has of a run, as pieces in Ray's object store."""
        files = [file for checkpoint in list_checkpoints(folder) for file in files_of(checkpoint)]
        return [(f.relative_to(folder).as_posix(), self._ray.put(data)) for f in files for data, _ in pieces_of(f)]

    def poll(self, jobs: list[Job]) -> None:
        """Reads the mailbox, and the results of the tasks that have ended."""
        if not jobs or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        tasks = {job.handle.reference: job for job in jobs}
        ended, _ = self._ray.wait(list(tasks), num_returns=len(tasks), timeout=0)  # before its last messages are read
        by_key = {job.handle.key: job for job in jobs}
        try:
            messages = self._ray.get(self._mailbox.take.remote(), timeout=self._seconds)
        except Exception as error:
            raise MachineError(f"--executor ray: the cluster does not answer: {first_line(error)}") from error
        for message in messages:
            if message.key in by_key:
                self._read(by_key[message.key], message)
        for reference in ended:
            self._end(tasks[reference])

    def _read(self, job: Job, message: Message) -> None:
        folder = job.run.folder
        if message.kind is Kind.STARTED:
            job.handle.node = message.names[0]
            job.starts(message.text)
        elif message.kind is Kind.NOTE:
            job.tell(EventKind.NOTE, f"{job.run.name}: {message.text}")
        elif message.kind is Kind.LOG:
            with open_own(folder / LOG_FILE) as log:
                log.write(message.data)
        elif message.kind is Kind.FILE:
            incoming = folder / _INCOMING
            add_piece(incoming, message.path, message.data)
            if message.is_last and step_of(Path(Path(message.path).parts[0])) < 0:
                target = folder / message.path
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(incoming / message.path, target)
        elif message.kind is Kind.CHECKPOINTS:
            self._take_checkpoints(folder, message.names)

    def _take_checkpoints(self, folder: Path, names: tuple[str, ...]) -> None:
        """Moves checkpoints that have come completely to their place, and removes those that the node has removed."""
        for checkpoint in list_checkpoints(folder / _INCOMING):
            with contextlib.suppress(OSError):
                os.replace(checkpoint, folder / checkpoint.name)
        for checkpoint in list_checkpoints(folder):
            if checkpoint.name not in names:
                remove(checkpoint)

    def _end(self, job: Job) -> None:
        errors = self._ray.exceptions
        try:
            job.ends(self._ray.get(job.handle.reference))
        except errors.OutOfMemoryError as error:
            job.ends(1, f"Ray: {first_line(error)}")
        except errors.RayTaskError as error:
            job.ends(1, f"its task failed: {str(error).strip().splitlines()[-1]}")
        except errors.RayError as error:  # of the worker, its node or its connection
            job.ends(1, f"Ray: {type(error).__name__}", is_lost=True)

    def cancel(self, jobs: list[Job], number: int) -> None:
        """Leaves the signal in the mailbox; after SIGKILL, waits up to 10 s for the ends of the tasks."""
        with contextlib.suppress(Exception):  # the cluster is gone, and so are its runs
            sent = [self._mailbox.send.remote(job.handle.key, number) for job in jobs]
            self._ray.get(sent, timeout=self._seconds)
            if number == signal.SIGKILL:
                references = [job.handle.reference for job in jobs]
                _, left = self._ray.wait(references, num_returns=len(references), timeout=_KILLED_SECONDS)
                for reference in left:
                    self._ray.cancel(reference, force=True)

    def collect(self, job: Job) -> None:
        """Removes what has come incompletely of an ended run; its files came with the messages."""
        self._active.remove(job)
        if job.code == 0:
            self._good_nodes.add(job.handle.node)
        shutil.rmtree(job.run.folder / _INCOMING, ignore_errors=True)

    def leave_out(self, job: Job) -> bool:
        """Leaves out a node on which no run has ended well, unless it is the last one."""
        node = job.handle.node if job.handle else ""
        if not node or node in self._good_nodes or len(self._nodes()) < 2:
            return False
        self._bad_nodes.add(node)
        return True

    def close(self) -> None:
        """Disconnects; ends Ray if it was started here."""
        self._ray.shutdown()
