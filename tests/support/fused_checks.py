"""What the NPU's fused AdamW must do with gradients it still holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from simulated_runs import environment
from tiny_run import REPOSITORY


def fused_semantics(**more: str) -> dict:
    """Report of tests/support/fused_semantics.py."""
    script = REPOSITORY / "tests" / "support" / "fused_semantics.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(**more), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check_fused_semantics(report: dict) -> None:
    """Gradients are overwritten in place: a replaced one would be ignored, and the last one stepped on again."""
    assert report["overwritten"] == pytest.approx(0.0, abs=1e-6)  # down by 1, up by 1
    assert report["replaced"] == pytest.approx(-2.0, abs=1e-6)  # down twice: the new gradient was not seen
    assert report["ours"] < 1e-6 < 0.01 < report["dropping"]
