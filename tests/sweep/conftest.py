"""A repository with a stub in place of run_glue.py, and a sweep that is started in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_stubs import Sweep, stub_repository


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return stub_repository(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def sweep(clone: Path, tmp_path: Path) -> Sweep:
    found = Sweep(clone)
    found.output = tmp_path / "out"
    return found
