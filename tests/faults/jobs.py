"""Runs that can be killed by the dozen, and what they leave to compare."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tiny_run

from bert_glue.config.arguments import Arguments
from bert_glue.storage import checkpoint, files

NOT_COMPARED = ("_runtime", "_per_second")


@dataclass
class Job:
    """One started process; `log` has its stdout and stderr."""

    pid: int
    log: Path
    server: Server

    def kill(self, number: int) -> None:
        """Send a signal; nothing if the process has ended."""
        os.kill(self.pid, number)  # not yet waited for, so the id is still its own

    def wait(self) -> int:
        """Exit code, or minus the signal that ended it."""
        return self.server.ask({"wait": self.pid})

    def text(self) -> str:
        """What it printed."""
        return self.log.read_text(encoding="utf-8")


class Server:
    """The process of `job_server.py`."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        paths = [str(tiny_run.REPOSITORY), str(here.parent / "support")]
        self._process = subprocess.Popen(
            [sys.executable, str(here / "job_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        )  # fmt: skip
        assert self._process.stdout.readline() == "ready\n"
        self._logs = 0

    def ask(self, request: dict) -> int:
        """One request, one number."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self, argv: list[str], folder: Path, entry: str = "main", die: tuple | None = None, is_plain: bool = False,
        **environment: str,
    ) -> Job:  # fmt: skip
        """A forked run.

        Args:
            folder: where its log goes.
            entry: main (run_glue.py) or fit (no final files).
            die: arguments of `die_in_save`.
            is_plain: without root's privilege to write everywhere.
        """
        self._logs += 1
        log = folder / f"job-{self._logs}.log"
        log.touch()
        log.chmod(0o666)
        request = {
            "argv": argv, "entry": entry, "log": str(log), "die": die, "is_plain": is_plain, "environment": environment,
        }  # fmt: skip
        return Job(self.ask({"start": request}), log, self)

    def start_ranks(self, argv: list[str], folder: Path, ranks: int, **more) -> list[Job]:
        """As many processes of one gloo group."""
        return self.start_each([argv] * ranks, folder, **more)

    def start_each(self, argvs: list[list[str]], folder: Path, **more) -> list[Job]:
        """The processes of one gloo group, each with flags of its own."""
        world = {"WORLD_SIZE": str(len(argvs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            self.start(argv, folder, **more, **world, RANK=str(n), LOCAL_RANK=str(n)) for n, argv in enumerate(argvs)
        ]

    def close(self) -> None:
        """End the server; it has nothing to put in order."""
        self._process.kill()
        self._process.wait(timeout=30)


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_state(output: Path) -> dict:
    """The facts in the last checkpoint of a run about where it ended, without times."""
    folder = max(checkpoint.list_checkpoints(output), key=checkpoint.step_of)
    assert checkpoint.verify(folder) == ""
    state = json.loads((folder / "trainer_state.json").read_text())
    state["history"] = [
        {key: value for key, value in entry.items() if not key.endswith(NOT_COMPARED)} for entry in state["history"]
    ]
    tensors = {path.name: files.file_hash(path) for path in sorted(folder.glob("*.safetensors"))}
    return {"folder": folder.name, **tensors, **state}


def argv_of(args: Arguments) -> list[str]:
    """The command line of `args`."""
    return tiny_run.flags_of(args)
