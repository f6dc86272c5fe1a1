"""The side of `--executor ray` that runs on the nodes: a task of Ray that is the parent of one run's process.

A node and the sweep talk through a mailbox, an actor on the sweep's own node: logs and files go one way, signals the
other. Where the nodes share the output folder, only the first word and the last one are needed. Where they do not, the
run writes into a temporary folder of its node, and its log, checkpoints and results are sent piece by piece.
"""

from __future__ import annotations

import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path, PurePosixPath
from typing import Any

from bert_glue import __version__
from bert_glue.errors import CheckpointError
from bert_glue.storage.checkpoint import MANIFEST, list_checkpoints, step_of
from bert_glue.storage.lock import wait_until_free
from bert_glue.sweep.executors.child import LOG_FILE, Order, end, start, wait
from bert_glue.sweep.plan import SETTINGS_FILE

PIECE_BYTES = 8 << 20
_PENDING_BYTES = 64 << 20  # in the mailbox, before nodes have to wait
_EXCHANGE_SECONDS = 0.5
_SYNC_SECONDS = 5.0  # between looks for new checkpoints
_ANSWER_SECONDS = 60.0


class Kind(Enum):
    """What a message is about."""

    STARTED = auto()
    LOG = auto()
    FILE = auto()
    CHECKPOINTS = auto()
    NOTE = auto()


@dataclass(frozen=True)
class Message:
    """From a node to the sweep.

    Args:
        key: the job.
        kind: STARTED: `text` is the host and `names` has the id of its node. LOG: `data` continues the log. FILE:
            `data` is the next piece of the file `path`, which ends with `is_last`. CHECKPOINTS: `names` are the folders
            that the node still has. NOTE: `text` is for the user.
        path: relative to the folder of the run, with slashes.
    """

    key: str
    kind: Kind
    text: str = ""
    path: str = ""
    data: bytes = b""
    is_last: bool = False
    names: tuple[str, ...] = ()


class Mailbox:
    """Messages of all nodes to the sweep, and signals from the sweep to the runs: an actor on the sweep's node."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._bytes = 0
        self._signals: dict[str, list[int]] = {}

    def exchange(self, key: str, messages: list[Message]) -> tuple[bool, list[int]]:
        """Takes messages of a job, unless the sweep has yet to read 64 MiB; also returns the signals for the job."""
        size = sum(len(message.data) for message in messages)
        is_taken = not size or self._bytes + size <= _PENDING_BYTES
        if is_taken:
            self._messages += messages
            self._bytes += size
        return is_taken, self._signals.pop(key, [])

    def take(self) -> list[Message]:
        """All messages since the last call."""
        found = list(self._messages)
        self._messages.clear()
        self._bytes = 0
        return found

    def send(self, key: str, number: int) -> None:
        """Leaves a signal for a job."""
        self._signals.setdefault(key, []).append(number)


class Post:
    """The mailbox as one task sees it.

    Args:
        mailbox: the handle of the actor.
        key: the job.
    """

    def __init__(self, mailbox: Any, key: str):
        self.mailbox, self.key = mailbox, key
        self.signals: list[int] = []

    def send(self, kind: Kind, **content: Any) -> None:
        """Sends one message, and waits while the mailbox is full. Signals that arrive are added to `signals`."""
        self._exchange([Message(self.key, kind, **content)])

    def look(self) -> None:
        """Only adds what has arrived to `signals`."""
        self._exchange([])

    def _exchange(self, messages: list[Message]) -> None:
        import ray

        is_taken = False
        while not is_taken:
            answer = self.mailbox.exchange.remote(self.key, messages)
            is_taken, arrived = ray.get(answer, timeout=_ANSWER_SECONDS)
            self.signals += arrived
            if not is_taken:
                time.sleep(_EXCHANGE_SECONDS)


def look_around(token: str) -> tuple[str, bool, str]:
    """The name of this node's host, whether it has the file `token`, and its version of bert_glue."""
    return socket.gethostname(), Path(token).is_file(), __version__


def run_order(
    order: Order, post: Post, settings: dict[str, str], grace: float, most: int, sent: list[tuple[str, Any]] | None
) -> int:
    """Runs a run in this task to its end, and returns the exit code of its process, -N if signal N ended it.

    Args:
        order: the run.
        post: the way to the sweep.
        settings: environment variables of the run.
        grace: seconds that the run has to save, if the sweep is gone.
        most: bytes of its folder, or of a checkpoint, that are sent.
        sent: pieces of the run's checkpoints, each a path and a reference; None: this node sees the output folder.
    """
    if sent is None:
        return _run(order, post, settings, grace, None)
    folder = Path(tempfile.mkdtemp(prefix="bert_glue_"))
    try:
        receive(folder, sent)
        flags = tuple(f"--output_dir={folder}" if flag.startswith("--output_dir=") else flag for flag in order.flags)
        work = order.work_folder if order.work_folder and order.work_folder.is_dir() else None
        mirror = Mirror(folder, post, most)
        code = _run(replace(order, folder=folder, flags=flags, work_folder=work), post, settings, grace, mirror)
        return mirror.finish(code)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(order: Order, post: Post, settings: dict[str, str], grace: float, mirror: Mirror | None) -> int:
    import ray

    wait_until_free([order.folder], grace)  # of a process that still saves because its task has ended
    process = start(order, settings)
    try:
        post.send(Kind.STARTED, text=socket.gethostname(), names=(ray.get_runtime_context().get_node_id(),))
        while (code := wait(process, _EXCHANGE_SECONDS)) is None:
            post.look()
            while post.signals:
                process.send_signal(post.signals.pop(0))
            if mirror is not None:
                mirror.update()
        return code
    except Exception:  # of Ray: the sweep is gone
        process.send_signal(signal.SIGTERM)
        wait(process, grace)
        raise
    finally:
        end(process)


class Mirror:
    """Sends what a run writes to the sweep.

    Args:
        folder: the folder of the run on this node.
        post: the way to the sweep.
        most: bytes of the results, and of each checkpoint, that are sent.
    """

    def __init__(self, folder: Path, post: Post, most: int):
        self._folder, self._post, self._most = folder, post, most
        self._log_bytes = 0
        self._sent = {found.name for found in list_checkpoints(folder)}
        self._next_look = 0.0

    def update(self) -> None:
        """Sends the new part of the log, and checkpoints that are complete."""
        self._send_log()
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _SYNC_SECONDS
        complete = [found for found in list_checkpoints(self._folder) if (found / MANIFEST).is_file()]
        new = [found for found in complete if found.name not in self._sent]
        for checkpoint in new:
            self._sent.add(checkpoint.name)
            size = _size(files_of(checkpoint))
            if size > self._most:
                why = f"{checkpoint.name} has {size >> 20} MiB and is not copied (--ray_collect_mib)"
                self._post.send(Kind.NOTE, text=f"{why}: if its node ends, the run begins again")
            else:
                # The manifest comes last: a checkpoint without it is none.
                files = sorted(files_of(checkpoint), key=lambda file: file.name == MANIFEST)
                self._send_files(files)
        if new:
            self._post.send(Kind.CHECKPOINTS, names=tuple(found.name for found in complete))

    def finish(self, code: int) -> int:
        """Sends the results. Returns the exit code of the run, or 6 if the results are larger than allowed."""
        self._next_look = 0.0
        self.update()
        files = [file for file in files_of(self._folder) if _is_result(file.relative_to(self._folder))]
        if (size := _size(files)) > self._most:
            what = f"the results have {size >> 20} MiB and are not copied"
            self._post.send(Kind.NOTE, text=f"{what}; give a larger --ray_collect_mib")
            return CheckpointError.exit_code
        self._send_files(files)
        return code

    def _send_log(self) -> None:
        with (self._folder / LOG_FILE).open("rb") as log:
            log.seek(self._log_bytes)
            while data := log.read(PIECE_BYTES):
                self._log_bytes += len(data)
                self._post.send(Kind.LOG, data=data)

    def _send_files(self, files: list[Path]) -> None:
        for file in files:
            path = file.relative_to(self._folder).as_posix()
            for data, is_last in pieces_of(file):
                self._post.send(Kind.FILE, path=path, data=data, is_last=is_last)


def _is_result(path: Path) -> bool:
    """Whether a file of a run's folder is sent when the run has ended: no checkpoint, log, lock or settings."""
    top = path.parts[0]
    return step_of(Path(top)) < 0 and not top.startswith(".") and top not in (LOG_FILE, SETTINGS_FILE)


def files_of(folder: Path) -> list[Path]:
    """All files below a folder. Links are left out."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.is_symlink()]


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def pieces_of(file: Path) -> Iterator[tuple[bytes, bool]]:
    """The content of a file in pieces of 8 MiB, each with whether it is the last one. An empty file has one piece."""
    left = file.stat().st_size
    with file.open("rb") as content:
        while True:
            data = content.read(PIECE_BYTES)
            left -= len(data)
            is_last = left <= 0 or not data
            yield data, is_last
            if is_last:
                return


def receive(folder: Path, sent: list[tuple[str, Any]]) -> None:
    """Writes pieces of files into a folder.

    Args:
        sent: each a path relative to the folder, and the reference of a piece; the pieces of a file in their order.
    """
    import ray

    for path, reference in sent:
        add_piece(folder, path, ray.get(reference))


def add_piece(folder: Path, path: str, data: bytes) -> None:
    """Appends a piece to a file below `folder`.

    Raises:
        ValueError: the path leads out of the folder.
        OSError: the file cannot be written.
    """
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{path!r} leads out of the folder of the run")
    file = folder / relative
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as content:
        content.write(data)
