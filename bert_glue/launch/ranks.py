"""Runs one rank of a launcher, and decides how the launch on this host ended. Imports nothing heavy.

    python ranks.py below command...               becomes the command, which ends when its parent ends
    python ranks.py meet NOTES SECONDS command...  the same, but ends it if no rank has started by then
    python ranks.py rank NOTES LOGS command...     started by torch's elastic launcher, once per rank
    python ranks.py verdict NOTES LOGS --launcher_log FILE --status S --signal N
    python ranks.py network HOST                                 -> "10.0.0.2 eth0": the route to a host

torch's launcher ends all ranks when one fails. But it waits 30 s for each rank that does not react, leaves
grandchildren behind, and gives the ranks no way to tell the user's signal from its own cleanup. So each rank runs
below a small process that knows how the other ranks of this host ended. NOTES is a folder of this launch on this host,
in which each rank writes `<rank>.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds after another rank failed until a rank that does not end by itself gets SIGTERM, and SIGKILL.
_ASKED, _MADE = 1.0, 4.0
_LOST, _DOCUMENTED = 7, (2, 3, 4, 5, 6, 8)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Exit codes of a rank that a signal told to save a checkpoint and end.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_STOPPED = tuple(128 + number for number in _SIGNALS)
_UNMET = "unmet"  # a file in NOTES: the hosts did not connect in time
_IMPORT_SECONDS = 15.0  # until torch's launcher starts to connect to the other hosts


def log_of(logs: Path, rank: int) -> Path:
    """The log of one rank."""
    return logs / f"train_rank_{rank}.log"


def die_with_parent() -> None:
    """Let the kernel send SIGKILL when the parent ends for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def signalled_with_parent(number: int) -> Callable[[], None]:
    """A `preexec_fn`: the child gets signal `number` when this process ends for any reason."""
    prctl = ctypes.CDLL(None).prctl  # looked up here, because nothing can safely be loaded after a fork
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # the parent ended between the fork and the call
            os._exit(128 + number)

    return prepare


def end_unless_met(notes: Path, seconds: float) -> None:
    """Start a process that kills this one (the later torch launcher) if no rank has started after `seconds`.

    torch's launcher waits without limit, in C++, on a port whose listener accepts but never answers.
    """
    parent = os.getpid()
    if os.fork():
        return
    die_with_parent()
    until = time.monotonic() + seconds
    while time.monotonic() < until and not _read_notes(notes):
        time.sleep(0.2)
    if not _read_notes(notes):
        (notes / _UNMET).touch()
        os.kill(parent, signal.SIGKILL)
    os._exit(0)


def _read_notes(notes: Path) -> list[dict[str, Any]]:
    """The notes of the ranks of this host, in the order of ranks."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in notes.glob("*.json")]
    return sorted(found, key=lambda note: note["rank"])


def _write_note(notes: Path, note: dict[str, Any]) -> None:
    aside = notes / f".{note['rank']}"
    aside.write_text(json.dumps(note), encoding="utf-8")
    os.replace(aside, notes / f"{note['rank']}.json")


def run_rank(notes: Path, logs: Path, command: list[str]) -> int:
    """Run one rank's command to its end. Returns its exit code, or 128 + signal if a signal killed it.

    The host's first rank writes to the launcher's two pipes, `NOTES/out` and `NOTES/err`, the others to their log.
    """
    rank, is_shown = int(os.environ["RANK"]), os.environ["LOCAL_RANK"] == "0"
    out_path = notes / "out" if is_shown else log_of(logs, rank)
    err_path = notes / "err" if is_shown else log_of(logs, rank)
    with out_path.open("ab") as out, err_path.open("ab") as err:
        note = {"rank": rank, "code": None, "is_cleared": False, "time": 0.0}
        _write_note(notes, note)
        die_with_parent()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,  # a process group of its own; process_group=0 needs Python 3.11
            preexec_fn=signalled_with_parent(signal.SIGKILL),
        )

        def pass_on(number: int, frame: object) -> None:
            if any(other["code"] for other in _read_notes(notes)):
                # Not from the user: torch's launcher ends the ranks because one has failed.
                # A failing rank may end others before it ends itself, so give it time to report its own reason.
                threading.Timer(_ASKED, clear).start()
                threading.Timer(_MADE, child.kill).start()
            else:
                child.send_signal(number)

        def clear() -> None:
            note["is_cleared"] = child.poll() is None
            child.terminate()

        for number in _SIGNALS:
            signal.signal(number, pass_on)
        code = child.wait()
        kill_group(child.pid)  # children that the rank left behind
    note |= {"code": code, "time": time.time()}
    _write_note(notes, note)
    os._exit(code if code >= 0 else 128 - code)  # a pending timer must not keep this process alive


def kill_group(group: int) -> None:
    """Send SIGKILL to every process of a group. Does nothing if none is left or they belong to another user."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def python_path() -> str:
    """PYTHONPATH of a child process that imports this package from any folder: ours, then the user's."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))


def _described(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _root(failed: list[dict[str, Any]]) -> dict[str, Any]:
    """The failure that caused the others: the earliest of a rank that was not ended and did not lose its peers."""
    return min(failed, key=lambda note: (note["is_cleared"], note["code"] == _LOST, note["time"]))


def last_lines(file: Path, count: int = 10) -> list[str]:
    """The last non-blank lines in the last 8 KiB of a log, up to `count`; none if it cannot be read."""
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-count:]


def verdict(notes: Path, logs: Path, launcher_log: Path, status: int, signal_number: int) -> tuple[int, list[str]]:
    """The outcome of a launch.

    Args:
        launcher_log: the output of torch's launcher.
        status: exit code of torch's launcher.
        signal_number: the signal that the launcher got from its user; 0 if none.

    Returns:
        The exit code for the user (0; 128 + signal; 2 to 6 and 8 as a rank gave it; 4 if no rank started; else 7)
        and lines that name the rank that failed first, how it failed, and its last output.
    """
    ranks = _read_notes(notes)
    failed = [note for note in ranks if note["code"]]
    stopped = 128 + signal_number
    ends = (*_STOPPED, -signal_number) if signal_number else _STOPPED
    if all(note["code"] in ends or note["is_cleared"] for note in failed):
        if signal_number:
            return stopped, []
        codes = [note["code"] for note in failed if not note["is_cleared"]]
        if codes:  # a rank got the signal and informed the others
            return max(codes), []
    if (notes / _UNMET).exists():
        where = "the first host does not answer at --master_addr and --master_port; another program may use the port"
        return _LOST, [f"no rank was started within --ddp_timeout: {where}"]
    if not ranks and status:
        lines = last_lines(launcher_log, 1)
        return 4, [f"no rank was started; torch's launcher ended with {status}: {launcher_log}", *lines]
    if not failed:
        if status == 0:
            return 0, []
        return _LOST, [f"torch's launcher ended with {status}: {launcher_log}"]
    root = _root(failed)
    code = root["code"] if root["code"] in _DOCUMENTED else _LOST
    log = log_of(logs, root["rank"])
    lines = [f"rank {root['rank']} {_described(root['code'])}; the last lines of {log}:"]
    return code, lines + [f"  {line}" for line in last_lines(log)]


def network_to(host: str) -> tuple[str, str]:
    """This host's own address on the route to `host`, and its interface ("" if it is not IPv4).

    Raises:
        OSError: the host does not exist or there is no route to it.
    """
    family, kind, *_, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # connecting a datagram socket only looks up the route and sends nothing
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:  # the interface has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return address, name
    return address, ""


def main(argv: list[str]) -> int:
    """Exit code of one rank, or of the launcher."""
    if argv[:1] == ["network"]:
        try:
            print(*network_to(argv[1]))
        except OSError:
            return 4
        return 0
    if argv[:1] in (["below"], ["meet"]):
        # Some schedulers signal every process of a job. torch's launcher would end; its ranks set their own handlers.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        die_with_parent()
    if argv[:1] == ["below"]:
        os.execvp(argv[1], argv[1:])
    if argv[:1] == ["meet"]:
        end_unless_met(Path(argv[1]), float(argv[2]) + _IMPORT_SECONDS)
        os.execvp(argv[3], argv[3:])
    parser = argparse.ArgumentParser(prog="launch_ranks")
    parser.add_argument("action", choices=("rank", "verdict"))
    parser.add_argument("notes", type=Path)
    parser.add_argument("logs", type=Path)
    if argv[:1] == ["rank"]:
        arguments = parser.parse_args(argv[:3])
        return run_rank(arguments.notes, arguments.logs, argv[3:])
    parser.add_argument("--launcher_log", type=Path, required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--signal", type=int, required=True)
    arguments = parser.parse_args(argv)
    code, lines = verdict(arguments.notes, arguments.logs, arguments.launcher_log, arguments.status, arguments.signal)
    for number, line in enumerate(lines):
        print(line if number else f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
