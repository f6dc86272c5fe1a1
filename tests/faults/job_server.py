"""Forks runs from one process that has imported everything: a run costs its work, not seconds of imports.

Reads one JSON request a line: {"start": {...}} answers with a process id, {"wait": pid} with its exit code
(negative: the signal that ended it). Started by `jobs.py`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

torch.set_num_threads(1)

import accelerate.state  # noqa: E402, F401  (imported here, used in the forks)
import safetensors.torch  # noqa: E402, F401
import sklearn.metrics  # noqa: E402, F401
import tiny_run  # noqa: E402
import tokenizers  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401  (the first optimizer would import it in every fork)
from matplotlib.figure import Figure  # noqa: E402, F401

import run_glue  # noqa: E402
from bert_glue.config import parser  # noqa: E402, F401
from bert_glue.storage import lock  # noqa: E402, F401

_FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_in_save(save: int, event: int, delay: float) -> None:
    """End this process at file operation number `event` of checkpoint number `save`, `delay` seconds after it.

    By SIGALRM's default action: the kernel ends the process wherever it is, no python code runs.
    """
    saves, events = 0, 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal saves, events
        if name not in _FILE_EVENTS:
            return
        if name == "os.mkdir" and "/.writing-checkpoint-" in str(arguments[0]):
            saves, events = saves + 1, 0
        if saves == save:
            if events == event:
                if not delay:
                    os.kill(os.getpid(), signal.SIGKILL)
                signal.setitimer(signal.ITIMER_REAL, delay)
            events += 1

    sys.addaudithook(hook)


def set_environment(changes: dict[str, str]) -> None:
    """Set variables, or take them away where the value is empty."""
    os.environ.update(changes)
    for name in [name for name, value in changes.items() if not value]:
        os.environ.pop(name, None)
    if "HF_HOME" in changes:  # read when these are imported, which the server has done
        for name in [name for name in sys.modules if name.partition(".")[0] in ("huggingface_hub", "datasets")]:
            del sys.modules[name]


def give_up_privileges() -> None:
    """Let file modes count for root too: no capability is left (capset, version 3 of its header)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def fit(argv: list[str]) -> int:
    """Everything up to the trained model and its checkpoints; no final files, which cost a plot."""
    args = parser.parse(argv)
    with lock.FolderLock(Path(args.output_dir), is_holder=os.environ.get("RANK", "0") == "0"):
        tiny_run.fit(args)
    return 0


def run(request: dict) -> int:
    """The forked process's work; its exit code."""
    set_environment(request["environment"])
    out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if request["is_plain"]:
        give_up_privileges()
    if request["die"] is not None:
        die_in_save(*request["die"])
    try:
        return {"main": run_glue.main, "fit": fit}[request["entry"]](request["argv"])
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def main() -> None:
    """Serve until stdin ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                code = run(request["start"])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
