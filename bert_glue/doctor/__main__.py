"""Reports what this machine can run and what to fix: `python -m bert_glue.doctor [--device npu:0] [--json]`.

It examines versions, devices, precisions, the attention path, apex, the hub, disk, memory and ports. The device trains
in a separate process, so a driver that crashes or hangs becomes one more finding.

Exit codes: 0 the requested device trains with the launchers' recipe; 2 usage; 4 it does not train.
Other problems are listed with their fix and do not change the exit code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from bert_glue.config.command_line import CommandParser
from bert_glue.config.values import read_seconds
from bert_glue.devices.host_memory import GIB
from bert_glue.devices.npu_versions import installed_version
from bert_glue.doctor.checks import HubCheck, Problem, disk, memory, ports, stack, versions
from bert_glue.errors import MachineError, UsageError, printable, run_program
from bert_glue.launch.ranks import kill_group, python_path

_NO_FIX = "python -m bert_glue.doctor --device auto lists the devices"
_RANK_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(argv: list[str]) -> int:
    """Examine, print, and return the exit code."""
    parser = CommandParser(prog="bert_glue.doctor", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="device that must train: auto, 0, npu, npu:1, cuda, cpu"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--time_limit",
        type=read_seconds,
        default=300.0,
        metavar="SECONDS",
        help="seconds that the device may take; default: 300",
    )
    args = parser.parse_args(argv)
    try:
        report = examine(args.device, args.time_limit)
    except KeyboardInterrupt:
        return 130
    sys.stdout.reconfigure(errors="replace")  # show as much of a driver's message as the terminal can
    try:
        print(json.dumps(report, indent=2) if args.json else printable("\n".join(lines(report))), flush=True)
    except OSError:  # the reader has gone, as with `| head`, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return report["exit_code"]


def examine(requested: str, time_limit: float) -> dict[str, Any]:
    """All findings as plain values.

    Args:
        requested: as `--device` of run_glue.py.
        time_limit: seconds the device may take.

    Returns:
        versions, stack, devices, auto, chosen, recipe, training, apex, hub, memory, disk, ports, problems
        (what, fix), can_train and exit_code. A part that could not be examined is None and has a problem.
    """
    problems: list[Problem] = []
    hub = _guarded("the hub client", problems, HubCheck)
    facts = _guarded("the device", problems, lambda: probe(requested, time_limit, problems)) or {}
    report: dict[str, Any] = {
        "requested": requested,
        "versions": _guarded("versions", problems, lambda: versions(problems)),
        **_devices(facts, problems),
        "hub": hub and _guarded("the hub", problems, lambda: hub.result(problems)),
        "memory": _guarded("memory", problems, lambda: memory(problems)),
        "disk": _guarded("disk", problems, lambda: disk(problems)),
        "ports": _guarded("ports", problems, lambda: ports(problems)),
    }
    is_unknown = any(fact.get("exit_code") == UsageError.exit_code for fact in facts.get("chosen", []))
    report["stack"] = stack(report["versions"]) if report["versions"] else []
    report["can_train"] = _can_train(report)
    report["exit_code"] = 2 if is_unknown else 4
    if report["can_train"]:
        report["exit_code"] = 0
    report["problems"] = [problem._asdict() for problem in dict.fromkeys(problems)]
    return report


def _can_train(report: dict[str, Any]) -> bool:
    """Whether the device trained in the precision that the default recipe selects."""
    wanted = (report["recipe"] or {}).get("precision")
    return any(fact.get("trains") and fact["plan"] == wanted for fact in report["training"].values())


def _guarded(name: str, problems: list[Problem], check: Callable[[], Any]) -> Any:
    """The result of `check`; None and a problem if it fails, so that the other checks still run."""
    try:
        return check()
    except Exception as error:
        what = f"{name}: {type(error).__name__}: {_first_line(str(error))}"
        fix = _reinstall() if isinstance(error, ImportError) else "see the message"
        problems.append(Problem(what, fix))
        return None


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]


def probe(requested: str, time_limit: float, problems: list[Problem]) -> dict[str, list[dict[str, Any]]]:
    """The lines of bert_glue.doctor.device_probe by kind, and the problems of the process itself."""
    facts = _run_probe(requested, time_limit, problems)
    failed = facts.get("torch", [{}])[0].get("problem")
    if failed:
        problems.append(Problem(f"torch or a module beside it cannot be imported: {failed}", _reinstall()))
    return facts


def _reinstall() -> str:
    """How to repair a package that is installed but cannot be imported. Never names another version of torch."""
    torch = installed_version("torch")
    wanted = f"--force-reinstall --no-deps torch=={torch}" if torch else "-r requirements.txt"
    return f"{sys.executable} -m pip install {wanted}"


def _run_probe(requested: str, time_limit: float, problems: list[Problem]) -> dict[str, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    child = subprocess.Popen(
        [sys.executable, "-m", "bert_glue.doctor.device_probe", requested],
        env={**environment, "PYTHONPATH": python_path()},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        kill_group(child.pid)
        out, err = _rest_of(child)
    except BaseException:
        kill_group(child.pid)
        raise
    facts: dict[str, list[dict[str, Any]]] = {}
    for line in out.decode(errors="replace").splitlines():
        with suppress(ValueError):  # the last line of a killed process may be half a line
            fact = json.loads(line)
            facts.setdefault(fact.pop("fact"), []).append(fact)
    status = -signal.SIGKILL if child.returncode is None else child.returncode
    if "end" not in facts and not facts.get("torch", [{}])[0].get("problem"):
        problems.append(_death(status, time_limit, list(facts), err.decode(errors="replace")))
    return facts


_KILLED_SECONDS = 10


def _rest_of(child: subprocess.Popen) -> tuple[bytes, bytes]:
    """What a killed process wrote. One that a driver holds cannot be killed, and is left behind."""
    try:
        return child.communicate(timeout=_KILLED_SECONDS)
    except subprocess.TimeoutExpired as error:
        return error.output or b"", error.stderr or b""


def _death(status: int, time_limit: float, known: list[str], errors: str) -> Problem:
    """The problem and the fix for a probe that did not finish."""
    where = f"after {known[-1]!r}" if known else "while Python started"
    last = _first_line("\n".join(reversed(errors.strip().splitlines())))
    if status == -signal.SIGKILL:
        what = f"the device gave no answer within {time_limit:g} s, or the process was killed ({where})"
        return Problem(what, "check that no other process uses the device, reset the device, or raise --time_limit")
    name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    return Problem(f"the process ended with {name} {where}: {last}", "check the driver and the device's log")


def _devices(facts: dict[str, list[dict[str, Any]]], problems: list[Problem]) -> dict[str, Any]:
    """The parts of the report about devices, from the facts of the probe."""
    chosen = facts.get("chosen", [{}])[0]
    for fact in (*facts.get("kind", []), *facts.get("auto", []), chosen):
        if fact.get("problem"):
            problems.append(Problem(fact["what"], fact["fix"] or _NO_FIX))
    training = {fact["precision"]: fact for fact in facts.get("training", [])}
    for name, fact in training.items():
        # A missing precision is a property of the device. Any other failure is a problem.
        is_lack = fact.get("exit_code") == MachineError.exit_code and name != "fp32"
        if "problem" in fact and not is_lack:
            fix = "check the device's memory, its other processes and its log"
            problems.append(Problem(f"training in {name} failed: {fact['problem']}", fix))
    return {
        "torch": facts.get("torch", [None])[0],
        "devices": [device for fact in facts.get("kind", []) for device in fact.get("devices", [])],
        "auto": facts.get("auto", [None])[0],
        "chosen": chosen or None,
        "recipe": facts.get("recipe", [None])[0],
        "training": training,
        "apex": facts.get("apex", [None])[0],
    }


_LEFT = 20  # columns


def lines(report: dict[str, Any]) -> list[str]:
    """The lines of a report of `examine`, with problems and verdict at the end."""
    found = ["versions", *_versions(report), "devices", *_device_lines(report), *_training(report)]
    found += ["host", *_host(report)]
    problems = report["problems"]
    if problems:
        found.append("problems")
        for number, problem in enumerate(problems, 1):
            found += [f"  {number}. {problem['what']}", f"     fix: {problem['fix']}"]
    name = (report["chosen"] or {}).get("device") or report["requested"]
    found.append(f"verdict: {name} {'trains' if report['can_train'] else 'cannot train'}")
    return found


def _row(name: str, text: str) -> str:
    return f"  {name.ljust(_LEFT)}{text}"


def _versions(report: dict[str, Any]) -> list[str]:
    known = report["versions"] or {}
    verdicts = {row["name"]: f" ({row['verdict']})" for row in report["stack"]}
    rows = [_row(name, version + verdicts.get(name, "")) for name, version in known.items() if version]
    absent = [name for name, version in known.items() if not version]
    return rows + ([_row("not installed", ", ".join(absent))] if absent else [])


def _device_lines(report: dict[str, Any]) -> list[str]:
    rows = []
    for device in report["devices"]:
        parts = [device["name"]]
        if device["total_bytes"]:
            parts.append(f"{device['free_bytes'] / GIB:.1f} of {device['total_bytes'] / GIB:.1f} GiB free")
        rounded = device.get("fp32_products") or ()
        has = [name for name in ("fp32", "bf16", "fp16") if device.get(name)]
        parts.append("trains in " + ", ".join(f"{n} (products in fp32)" if n in rounded else n for n in has))
        if device.get("product_library"):
            parts.append(f"large fp32 products by {device['product_library']}")
        if device.get("problem"):
            parts.append(device["problem"])
        rows.append(_row(device["device"], "; ".join(parts)))
    auto = (report["auto"] or {}).get("device") or "no precision works"
    return [*rows, _row("--device auto", f"chooses {auto}")]


def _training(report: dict[str, Any]) -> list[str]:
    name = (report["chosen"] or {}).get("device") or report["requested"]
    rows = [f"training on {name}: a tiny packed classifier"]
    for precision, fact in report["training"].items():
        if not fact.get("trains"):
            rows.append(_row(precision, f"no: {fact['problem']}"))
            continue
        losses = " -> ".join(f"{loss:.4f}" for loss in fact["losses"])
        rows.append(_row(precision, f"trains: {fact['plan']}, {fact['steps']} steps, loss {losses}"))
        rows.append(_row("", f"matrix products at {fact['gemm_gflops_per_second']:,.0f} GFLOP/s"))
        rows += [_row("", f"attention {path}") for path in fact["attention"]]
    if report["recipe"]:
        note = f" ({report['recipe']['note']})" if report["recipe"].get("note") else ""
        rows.append(_row("default recipe", f"{report['recipe'].get('precision', 'unknown')}{note}"))
    rows.append(_row("apex", _apex(report["apex"])))
    return rows


def _apex(found: dict[str, Any] | None) -> str:
    if not found:
        return "unknown"
    if found.get("problem"):
        return f"cannot be imported: {found['problem']}; runs use the native O-levels"
    if not found["installed"]:
        return "not installed; runs use the native O-levels"
    return "with amp" if found["amp"] else "without amp; runs use the native O-levels"


def _host(report: dict[str, Any]) -> list[str]:
    rows = []
    memory, hub, ports = report["memory"], report["hub"], report["ports"]
    if memory and memory["available_bytes"] is not None:
        rows.append(
            _row("memory", f"{memory['available_bytes'] / GIB:.1f} of {memory['total_bytes'] / GIB:.1f} GiB available")
        )
    for place in report["disk"] or []:
        state = "" if place["writable"] else ", cannot be written"
        rows.append(_row(place["purpose"], f"{place['folder']}: {place['free_bytes'] / GIB:.1f} GiB free{state}"))
    if hub:
        verified = ", certificate verified" if hub["certificate_verified"] else ""
        reason = f" ({hub['reason']})" if hub["reason"] else ""
        rows.append(_row("hub", f"{hub['endpoint']}: {hub['state']}{reason}{verified}"))
    if ports:
        rows.append(_row("free port", "can be bound" if ports["free_port"] else "cannot be bound"))
        if ports["MASTER_PORT"]:
            master = ports["MASTER_PORT"]
            rows.append(_row("MASTER_PORT", f"{master['port']}: {master['reason'] or 'free'}"))
    return rows


if __name__ == "__main__":
    run_program(main)
