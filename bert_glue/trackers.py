"""Experiment trackers behind `--report_to`, through accelerate; off unless asked for."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

from bert_glue.arguments import Arguments
from bert_glue.errors import MachineError


class Trackers:
    """Every tracker named by `--report_to`; none of them on ranks that do not write.

    Args:
        is_first: whether this rank reports.

    `notes` are lines for the log.

    Raises:
        MachineError: a tracker's package is not installed or does not start.
    """

    def __init__(self, args: Arguments, is_first: bool):
        self._trackers: list[Any] = []
        self.notes: list[str] = []
        names = [name for name in args.report_to.split(",") if name != "none"]
        if not names or not is_first:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
        for name in available if names == ["all"] else names:
            if name not in available:
                here = ", ".join(available) or "none"
                raise MachineError(f"--report_to {name}: its package is not installed (available: {here})")
            self.notes += _stay_offline_without_login(name)
            self._trackers.append(_start(LOGGER_TYPE_TO_CLASS[name], name, args))

    def log(self, values: dict, step: int) -> None:
        """Numbers of one log entry; texts and nulls are left out."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        """Let every tracker write what it still holds."""
        for tracker in self._trackers:
            tracker.finish()


# tracker -> (its key, its mode, the file a login leaves, the host in it)
_LOGINS = {
    "wandb": ("WANDB_API_KEY", "WANDB_MODE", "~/.netrc", "api.wandb.ai"),
    "swanlab": ("SWANLAB_API_KEY", "SWANLAB_MODE", "~/.swanlab/.netrc", ""),
}


def _stay_offline_without_login(name: str) -> list[str]:
    """A batch job has nobody to answer a login prompt: without a login a tracker records to files.

    Returns:
        A line that says so; none where there is a login, or the user chose a mode.
    """
    if name not in _LOGINS:
        return []
    key, mode, file, host = _LOGINS[name]
    if os.environ.get(key) or os.environ.get(mode) or _has_login(Path(os.environ.get("NETRC", file)), host):
        return []
    os.environ[mode] = "offline"
    return [f"--report_to {name}: no login here ({key} is not set): it records to files ({mode}=offline)"]


def _has_login(file: Path, host: str) -> bool:
    try:
        return any(host in known for known in netrc.netrc(file.expanduser()).hosts)
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: no home folder
        return False


def _start(kind: type, name: str, args: Arguments) -> Any:
    run_name = args.run_name or Path(args.output_dir).name
    try:
        tracker = kind(run_name, logging_dir=args.output_dir) if kind.requires_logging_directory else kind(run_name)
        if hasattr(tracker, "start"):
            tracker.start()
        tracker.store_init_configuration(
            {k: v for k, v in vars(args).items() if isinstance(v, str | int | float) and k != "token"}
        )
        return tracker
    except Exception as error:  # each tracker fails in its own way
        raise MachineError(f"--report_to {name}: it does not start: {error}") from error
