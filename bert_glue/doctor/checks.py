"""The doctor's checks of the host: versions, memory, disk, ports, the hub. Imports nothing heavy.

Every check returns plain values for the report and may add problems, each with a fix of one line.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bert_glue.config.arguments import without_login
from bert_glue.devices.host_memory import GIB, total_and_available
from bert_glue.devices.npu_versions import cann_verdict, cann_version, installed_version, torch_verdict
from bert_glue.errors import MachineError
from bert_glue.launch import requirements
from bert_glue.storage.files import cache_folder

PACKAGES = (
    "torch", "torch_npu", "transformers", "datasets", "accelerate", "tokenizers", "safetensors", "huggingface_hub",
    "numpy", "scipy", "scikit-learn", "apex", "flash_attn", "optuna", "peft", "modelscope",
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parents[2]
# bert-large: 335 million parameters as weights, fp32 master weights and two moments.
_CHECKPOINT_BYTES = 335_000_000 * 16
_LITTLE_MEMORY = 4 * GIB
_HUB_SECONDS = 5.0


class Problem(NamedTuple):
    """A problem and its fix, each in one line."""

    what: str
    fix: str


def versions(problems: list[Problem]) -> dict[str, str | None]:
    """Versions of Python, CANN and all relevant packages; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "CANN": cann_version()}
    for name in PACKAGES:
        found[name] = installed_version(name)
    problems.extend(_requirements())
    return found


def _requirements() -> list[Problem]:
    pins = REPOSITORY / "requirements.txt"
    if not pins.is_file():  # installed as a package, without the requirements files
        return []
    try:
        fix = requirements.command([pins])
    except MachineError as error:
        fix = str(error)
    untested = [
        Problem(line, f"none is needed while it works; {requirements.SEE}") for line in requirements.stack_warnings()
    ]
    return [Problem(f"python lacks {found}", fix) for found in requirements.gaps([pins])] + untested


def stack(found: dict[str, str | None]) -> list[dict[str, str]]:
    """Whether the parts that must fit together do: name, version and verdict of each installed part.

    Args:
        found: as from `versions`.
    """
    rows = [
        (
            name,
            version,
            f"{'within' if requirements.is_tested(version, known) else 'outside'} the tested range, {known}",
        )
        for name, known in requirements.STACK.items()
        if (version := found.get(name))
    ]
    if torch_npu := found["torch_npu"]:
        rows += [("torch_npu", torch_npu, torch_verdict(torch_npu, found["torch"]))]
        rows += [("CANN", found["CANN"] or "not found", cann_verdict(torch_npu, found["CANN"]))]
    return [dict(zip(("name", "version", "verdict"), row, strict=True)) for row in rows]


def memory(problems: list[Problem]) -> dict[str, int | None]:
    """Total and available memory of the host in bytes, within a container's limit."""
    total, available = total_and_available()
    if available is not None and available < _LITTLE_MEMORY:
        fix = "end other processes, or choose a smaller --per_device_train_batch_size or --gradient_checkpointing"
        problems.append(Problem(f"only {available / GIB:.1f} GiB of memory are available", fix))
    return {"total_bytes": total, "available_bytes": available}


def disk(problems: list[Problem]) -> list[dict[str, Any]]:
    """The folders to which a run writes: free bytes, and whether they are writable."""
    home = Path(os.environ.get("HOME") or tempfile.gettempdir())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = os.environ.get("HF_HOME")
    places = (
        ("results", Path.cwd(), "start in a writable folder, or give one as --output_dir"),
        ("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a writable folder"),
        ("tokenized data", cache_folder(), "set BERT_GLUE_CACHE to a writable folder"),
        ("hub cache", Path(hub) if hub else cache / "huggingface", "set HF_HOME to a writable folder"),
    )
    found = []
    for purpose, folder, fix in places:
        there = next((part for part in (folder, *folder.parents) if part.is_dir()), Path("/"))
        writable, free = _can_write(there), shutil.disk_usage(there).free
        found.append({"purpose": purpose, "folder": str(folder), "free_bytes": free, "writable": writable})
        if not writable:
            problems.append(Problem(f"{folder} ({purpose}) cannot be written", fix))
    if found[0]["free_bytes"] < _CHECKPOINT_BYTES:
        what = f"{found[0]['free_bytes'] / GIB:.1f} GiB free here; a bert-large checkpoint takes 5.0 GiB"
        problems.append(Problem(what, "give --output_dir on a larger disk, or --save_strategy no"))
    return found


def _can_write(folder: Path) -> bool:
    """Tries to write, because permission bits do not show read-only mounts and do not apply to root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def ports(problems: list[Problem]) -> dict[str, Any]:
    """Whether a free port can be bound, and the port of MASTER_PORT if it is set."""
    found: dict[str, Any] = {"free_port": _can_bind(0) == "", "MASTER_PORT": None}
    if not found["free_port"]:
        problems.append(Problem(f"no port can be bound: {_can_bind(0)}", "allow this process to open sockets"))
    text = os.environ.get("MASTER_PORT")
    if text is None:
        return found
    fix = "unset MASTER_PORT, or set it to a free port from 1024 to 65535"
    is_listener = all(os.environ.get(name, "0") == "0" for name in ("RANK", "NODE_RANK", "GROUP_RANK"))
    reason = "it is not a port" if not text.isdecimal() or not 0 < int(text) < 65536 else ""
    if not reason and is_listener:
        reason = _can_bind(int(text))
    found["MASTER_PORT"] = {"port": text, "usable": not reason, "reason": reason}
    if reason:
        problems.append(Problem(f"MASTER_PORT={text}: {reason}", fix))
    return found


def _can_bind(port: int) -> str:
    """The reason why a TCP port cannot be bound on this host; "" if it can."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
        return ""
    except OSError as error:
        return (error.strerror or str(error)).lower()


class HubCheck:
    """Contacts the hub while other checks run. Being offline is not a problem; a refused certificate is."""

    def __init__(self) -> None:
        from huggingface_hub import constants

        from bert_glue.hub.client import start_probe

        self.endpoint, self.began = without_login(constants.ENDPOINT), time.monotonic()
        self.probe = start_probe()

    def result(self, problems: list[Problem]) -> dict[str, Any]:
        """State, reason and endpoint, at most five seconds after the start."""
        found = {"endpoint": self.endpoint, "certificate_verified": False, "reason": None}
        if self.probe is None:
            return {**found, "state": "offline", "reason": "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"}
        self.probe.join(max(0.0, self.began + _HUB_SECONDS - time.monotonic()))
        reason = self.probe.wait()
        if reason is None:
            return {**found, "state": "reachable", "certificate_verified": self.endpoint.startswith("https:")}
        if "CERTIFICATE" in reason.upper():
            fix = "set SSL_CERT_FILE to the bundle with your network's certificate authority"
            problems.append(Problem(f"the hub's certificate is refused ({reason})", fix))
        return {**found, "state": "not reachable", "reason": reason}
