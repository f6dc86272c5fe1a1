"""Experiment trackers behind `--report_to`, through accelerate; off unless asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bert_glue.arguments import Arguments
from bert_glue.errors import MachineError


class Trackers:
    """Every tracker named by `--report_to`; none of them on ranks that do not write.

    Args:
        is_first: whether this rank reports.

    Raises:
        MachineError: a tracker's package is not installed or does not start.
    """

    def __init__(self, args: Arguments, is_first: bool):
        self._trackers: list[Any] = []
        names = [name for name in args.report_to.split(",") if name != "none"]
        if not names or not is_first:
            return
        # A batch job has nobody to answer a login prompt: without a key wandb records to files.
        if not os.environ.get("WANDB_API_KEY"):
            os.environ.setdefault("WANDB_MODE", "offline")
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
        for name in available if names == ["all"] else names:
            if name not in available:
                here = ", ".join(available) or "none"
                raise MachineError(f"--report_to {name}: its package is not installed (available: {here})")
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
