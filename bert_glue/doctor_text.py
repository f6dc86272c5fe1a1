"""The doctor's findings as text."""

from __future__ import annotations

from typing import Any

from bert_glue.doctor_checks import GIB

_LEFT = 20  # columns


def lines(report: dict[str, Any]) -> list[str]:
    """All of a report of `doctor.examine`, problems and verdict last."""
    found = ["versions", *_versions(report), "devices", *_devices(report), *_training(report)]
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
    rows = [_row(name, version) for name, version in known.items() if version]
    absent = [name for name, version in known.items() if not version]
    return rows + ([_row("not installed", ", ".join(absent))] if absent else [])


def _devices(report: dict[str, Any]) -> list[str]:
    rows = []
    for device in report["devices"]:
        parts = [device["name"]]
        if device["total_bytes"]:
            parts.append(f"{device['free_bytes'] / GIB:.1f} of {device['total_bytes'] / GIB:.1f} GiB free")
        rounded = device.get("fp32_products") or ()
        has = [name for name in ("fp32", "bf16", "fp16") if device.get(name)]
        parts.append("trains in " + ", ".join(f"{n} (products in fp32)" if n in rounded else n for n in has))
        if device.get("problem"):
            parts.append(device["problem"])
        rows.append(_row(device["device"], "; ".join(parts)))
    auto = (report["auto"] or {}).get("device") or "nothing that works"
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
        return f"cannot be imported: {found['problem']}; native O-levels are used"
    if not found["installed"]:
        return "not installed; native O-levels are used"
    return "with amp" if found["amp"] else "without amp; native O-levels are used"


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
