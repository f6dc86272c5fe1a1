"""Explains why torch_npu cannot be imported: the versions of torch, torch_npu and CANN here, and the matching ones."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

from bert_glue.errors import MachineError, first_line


def cann_version() -> str | None:
    """Version of the Ascend toolkit that the environment points at, else of the first one found.

    Read from its `version.cfg`, `version.info` or `ascend_toolkit_install.info`; None without a CANN.
    """
    homes = [os.environ.get("ASCEND_HOME_PATH"), os.environ.get("ASCEND_TOOLKIT_HOME")]
    for base in (os.environ.get("HOME", ""), "/usr/local"):
        homes += [f"{base}/Ascend/{name}" for name in ("cann", "ascend-toolkit/latest", "nnae/latest")]
    files = ("version.cfg", "version.info", "*-linux/ascend_toolkit_install.info", "*-linux/ascend_nnae_install.info")
    for home in filter(None, homes):
        for pattern in files:
            for file in sorted(Path(home).glob(pattern)):
                text = file.read_text(encoding="utf-8", errors="replace")
                if match := re.search(r"(?im)^\W*(?:\w*version)\W*=\W*([\w.]+)", text):
                    return match[1]
    return None


# torch_npu is built for one X.Y of torch (its metadata: `Requires-Dist: torch==X.Y.Z.*`) and tested with one CANN.
# Source: TorchNPU's COMPATIBILITY.md, and for CANN 8.5.0 also the README in torch_npu 2.13.0's metadata.
PAIRS = (
    ("2.6.0.post5, 2.7.1.post2, 2.8.0.post2, 2.9.0", "8.5.0"),
    ("2.7.1.post4, 2.8.0.post4, 2.9.0.post2, 2.10.0", "9.0.0"),
    ("2.7.1.post8, 2.9.0.post6, 2.10.0.post4, 2.11.0, 2.12.0", "9.1.0"),
    ("2.13.0", "not named in its wheel: see COMPATIBILITY.md of TorchNPU 26.2.0"),
)


def explained(error: BaseException) -> MachineError:
    """The failure with its fix, the installed versions, and the versions that match."""
    text = first_line(error)
    torch, torch_npu = (installed_version(name) or "of unknown version" for name in ("torch", "torch_npu"))
    more = (
        f"here: torch {torch}, torch_npu {torch_npu}, {_cann()}",
        "torch_npu X.Y.Z needs torch X.Y.Z, and a CANN (source: TorchNPU's COMPATIBILITY.md):",
        *(f"  torch_npu {versions}: CANN {cann}" for versions, cann in PAIRS),
        "--device cpu and --device cuda train without torch_npu",
    )
    return MachineError(f"torch_npu cannot be imported: {text}", _fix(text, torch, torch_npu), more)


def _fix(text: str, torch: str, torch_npu: str) -> str:
    wanted, has = _release(torch_npu), _release(torch)
    if wanted and has and wanted[:2] != has[:2]:
        pair = ".".join(wanted[:3])
        return f"it was built for torch {pair}, not {torch}: install torch=={pair}, or the torch_npu of torch {torch}"
    if "Two accelerators" in text:
        return "install the CPU build of torch beside it"
    if "undefined symbol" in text:
        return "it was built for another torch or CANN than these: install a matching pair and source CANN's set_env.sh"
    if re.search(r"lib\w+\.so|ASCEND_\w+|TBE|te\b", text):
        return "CANN's libraries are not found: install CANN and source its set_env.sh"
    return "reinstall a matching pair and source CANN's set_env.sh"


def installed_version(package: str) -> str | None:
    """Version of an installed package; None where there is none, or where its record is damaged."""
    try:
        return metadata.version(package)
    except Exception:  # a damaged record raises what it likes
        return None


def torch_verdict(torch_npu: str, torch: str | None) -> str:
    """Whether an installed torch is the one that torch_npu was built for."""
    wanted = ".".join(_release(torch_npu)[:2])
    if torch and _release(torch)[:2] == wanted.split("."):
        return f"goes with torch {torch}"
    return f"does not go with torch {torch or '(not installed)'}: it was built for torch {wanted}"


def cann_verdict(torch_npu: str, cann: str | None) -> str:
    """Whether a CANN is the one that torch_npu was tested with, as far as `PAIRS` knows."""
    wanted = next((tested for versions, tested in PAIRS if torch_npu in versions.split(", ")), None)
    if wanted is None:
        return f"torch_npu {torch_npu} is not in our table: see TorchNPU's COMPATIBILITY.md"
    if cann and cann.startswith(wanted):
        return f"tested with torch_npu {torch_npu}"
    return f"torch_npu {torch_npu} was tested with CANN {wanted}"


def _release(version: str) -> list[str]:
    return re.findall(r"\d+", version.partition("+")[0].partition(".post")[0])


def _cann() -> str:
    home = os.environ.get("ASCEND_HOME_PATH")
    where = f"ASCEND_HOME_PATH={home}" if home else "ASCEND_HOME_PATH is not set: no set_env.sh was sourced"
    return f"CANN {cann_version() or 'not found'} ({where})"
