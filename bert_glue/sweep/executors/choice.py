"""`--executor`: the flags of clusters, what they exclude, and the executor that they choose."""

from __future__ import annotations

import argparse
import re
from functools import cache

from bert_glue.config.values import read_seconds
from bert_glue.errors import UsageError
from bert_glue.sweep.executors.interface import Executor
from bert_glue.sweep.executors.local import LocalExecutor, check_device, devices_here, slots_of
from bert_glue.sweep.plan import SweepRun
from bert_glue.sweep.side_by_side import AUTO, settle

LOCAL, RAY, SLURM = "local", "ray", "slurm"
NAMES = (LOCAL, RAY, SLURM)
_SLURM = "slurm_"
_SECONDS, _MIB = 60.0, 4096
# flag -> the executors that read it
_OF = {"max_runs": (RAY, SLURM), "ray_address": (RAY,), "ray_timeout": (RAY,), "ray_cores": (RAY,),
       "ray_collect_mib": (RAY,)}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--executor` and the flags of clusters. `--slurm_NAME` is read by `without_slurm_settings`."""
    group = parser.add_argument_group("clusters (docs/clusters.md)", _SLURM_TEXT)
    add = group.add_argument
    add("--executor", choices=NAMES, default=LOCAL, help="where runs start; default: local, on this host")
    add("--max_runs", type=int, metavar="N", help="runs at once, from 1; default: what Ray's nodes hold; in Slurm "
        "1000, or 8 with --search")  # fmt: skip
    add("--ray_address", metavar="HOST:PORT", help="a Ray cluster; default: RAY_ADDRESS, or else Ray is started here")
    add("--ray_timeout", type=read_seconds, metavar="SECONDS", help="time for an answer of the cluster; default 60")
    add("--ray_cores", type=int, metavar="N", help="cores of a run in Ray, from 1; default: those of a node divided by "
        "its devices and --jobs")  # fmt: skip
    add("--ray_collect_mib", type=int, metavar="MIB", help="most that is copied to this host of one run where nodes do "
        "not share --output_dir, in MiB, from 1; default 4096")  # fmt: skip


_SLURM_TEXT = """With --executor slurm, --slurm_NAME VALUE passes the option NAME on to sbatch, such as
--slurm_partition gpu or --slurm_gres npu:1. --slurm_time is in minutes, default 240.
--slurm_cluster local runs the jobs as processes of this host, to try them out."""


def without_slurm_settings(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--slurm_NAME VALUE` out of a command line, because every option of sbatch is allowed as NAME.

    Returns:
        The other words, and NAME -> VALUE. A NAME without a value has "".
    """
    rest: list[str] = []
    settings: dict[str, str] = {}
    at = 0
    while at < len(words):
        name, equals, value = words[at].partition("=")
        name = name.replace("-", "_")
        at += 1
        if not name.startswith(f"__{_SLURM}"):
            rest.append(words[at - 1])
            continue
        if not equals and at < len(words) and not words[at].startswith("--"):
            value, at = words[at], at + 1
        settings[name[len(_SLURM) + 2 :]] = value
    return rest, settings


def check_flags(options: argparse.Namespace) -> None:
    """Checks the flags of clusters against `--executor`.

    Raises:
        UsageError: a flag of another executor, a number below 1, or a device that a cluster cannot be asked for.
    """
    name = options.executor
    for flag, readers in _OF.items():
        value = getattr(options, flag)
        if value is not None and name not in readers:
            raise UsageError(f"--{flag} needs --executor {' or '.join(readers)}, not {name}")
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--{flag} {value} is below the minimum of 1")
    settings = options.slurm_settings
    if settings and name != SLURM:
        raise UsageError(f"--{_SLURM}{next(iter(settings))} needs --executor {SLURM}, not {name}")
    if bad := [key for key in settings if not re.fullmatch(r"[a-z]\w*", key)]:
        raise UsageError(f"--{_SLURM}{bad[0]}: the name of an option of sbatch follows {_SLURM}")
    if options.jobs is not None and (name == SLURM or (name == RAY and options.jobs == AUTO)):
        raise UsageError(f"--jobs {options.jobs}: Slurm gives each run its own device, and Ray needs a number")
    if name != LOCAL and options.devices != AUTO:
        if not options.devices.isalpha():
            raise UsageError(
                f"--devices {options.devices}: --executor {name} chooses the devices of a run; give their kind alone, "
                "or auto"
            )
        check_device(options.devices)


def executor_of(options: argparse.Namespace, run: SweepRun) -> tuple[Executor, str]:
    """The executor of `--executor`, which is not open yet, and a line on the runs that share a device, or "".

    Args:
        run: one of the sweep; its size decides how many share a device of this host.

    Raises:
        MachineError: its package is not installed.
        UsageError: its flags are wrong.
    """
    is_search = options.search is not None
    if options.executor == RAY:
        from bert_glue.sweep.executors.ray import RayExecutor

        executor = RayExecutor(
            address=options.ray_address, seconds=options.ray_timeout or _SECONDS, device=options.devices,
            jobs_per_device=options.jobs or 1, cores=options.ray_cores, most=options.max_runs, grace=options.grace,
            collected_bytes=(options.ray_collect_mib or _MIB) << 20,
        )  # fmt: skip
        return executor, ""
    if options.executor == SLURM:
        from bert_glue.sweep.executors.slurm import SlurmExecutor

        settings, most = options.slurm_settings, options.max_runs
        return SlurmExecutor(settings, options.devices, most, is_search, options.grace), ""
    listed = cache(devices_here)
    jobs, why = settle(options.jobs, options.devices, listed, run)
    return LocalExecutor(slots_of(options.devices, jobs, listed)), why
