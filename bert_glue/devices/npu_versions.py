"""Explains why torch_npu cannot be imported, by the installed versions of torch, torch_npu and CANN."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path

from bert_glue.errors import MachineError, first_line


def cann_version() -> str | None:
    """The version of the CANN that the environment names, else of the first one found. None without a CANN.

    It is read from `version.cfg`, `version.info` or `ascend_toolkit_install.info`.
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
    """The error for a torch_npu that cannot be imported: the reason, the fix, and the matching versions.

    The fix follows from the installed versions. The text of `error` is only shown, because it differs between versions.
    """
    torch, torch_npu = (installed_version(name) or "of unknown version" for name in ("torch", "torch_npu"))
    more = (
        f"installed: torch {torch}, torch_npu {torch_npu}, {_cann()}",
        "torch_npu X.Y.Z needs torch X.Y.Z and a CANN (source: COMPATIBILITY.md of TorchNPU):",
        *(f"  torch_npu {versions}: CANN {cann}" for versions, cann in PAIRS),
        "--device cpu and --device cuda train without torch_npu",
    )
    return MachineError(f"torch_npu cannot be imported: {first_line(error)}", _fix(torch, torch_npu), more)


def _fix(torch: str, torch_npu: str) -> str:
    """What to install or set, by the first version that does not match."""
    wanted, has = _release(torch_npu), _release(torch)
    if wanted and has and wanted[:2] != has[:2]:
        pair = ".".join(wanted[:3])
        return f"it was built for torch {pair}, not {torch}: install torch=={pair}, or the torch_npu of torch {torch}"
    if _is_cuda_build(torch):
        return "install the CPU build of torch: a CUDA build and torch_npu are two accelerators, and torch allows one"
    cann, tested = cann_version(), _tested_cann(torch_npu)
    if cann is None:
        return "CANN is not installed: install CANN and source its set_env.sh"
    if not os.environ.get("ASCEND_HOME_PATH"):
        return f"the environment of CANN {cann} is not set: source its set_env.sh"
    if tested and not cann.startswith(tested):
        return f"torch_npu {torch_npu} was tested with CANN {tested}, not {cann}: install CANN {tested}"
    return "the versions match: reinstall torch_npu, and source the set_env.sh of CANN"


def _is_cuda_build(torch: str) -> bool:
    """True if torch is built for CUDA, by its version (+cu126) or, as on PyPI, by the packages that it requires."""
    local = torch.partition("+")[2]
    if local:
        return local.startswith("cu")
    try:
        return any(requirement.startswith("nvidia-") for requirement in metadata.requires("torch") or ())
    except Exception:  # a damaged record can raise any exception
        return False


def installed_version(package: str) -> str | None:
    """The version of an installed package. None if it is not installed or its record is damaged."""
    try:
        return metadata.version(package)
    except Exception:  # a damaged record can raise any exception
        return None


def torch_verdict(torch_npu: str, torch: str | None) -> str:
    """Whether the installed torch is the version that torch_npu was built for, as a sentence."""
    wanted = ".".join(_release(torch_npu)[:2])
    if torch and _release(torch)[:2] == wanted.split("."):
        return f"matches torch {torch}"
    return f"does not match torch {torch or '(not installed)'}: it was built for torch {wanted}"


def cann_verdict(torch_npu: str, cann: str | None) -> str:
    """Whether CANN has the version that torch_npu was tested with according to `PAIRS`, as a sentence."""
    wanted = next((cann for versions, cann in PAIRS if torch_npu in versions.split(", ")), None)
    if wanted is None:
        return f"torch_npu {torch_npu} is not in our table; see COMPATIBILITY.md of TorchNPU"
    if cann and cann.startswith(wanted):
        return f"tested with torch_npu {torch_npu}"
    return f"torch_npu {torch_npu} was tested with CANN {wanted}"


def _tested_cann(torch_npu: str) -> str | None:
    """The version of CANN that torch_npu was tested with. None if `PAIRS` does not name one."""
    named = next((cann for versions, cann in PAIRS if torch_npu in versions.split(", ")), "")
    return named if named[:1].isdigit() else None


def _release(version: str) -> list[str]:
    return re.findall(r"\d+", version.partition("+")[0].partition(".post")[0])


def _cann() -> str:
    home = os.environ.get("ASCEND_HOME_PATH")
    where = f"ASCEND_HOME_PATH={home}" if home else "ASCEND_HOME_PATH is not set: set_env.sh was not sourced"
    return f"CANN {cann_version() or 'not found'} ({where})"
