"""Several runs of run_glue.py on the simulated NPU in one process, to import everything once.

    PYTHONPATH=tests/support/simulated_npu python tests/support/simulated_runs.py RUNS.json

RUNS.json holds `{"name": [words of the command line]}`. Each run's output goes to `<name>.log` beside it,
and `RUNS.json.done` holds exit codes, how attention was computed and how often each operator ran.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

REPOSITORY = Path(__file__).parents[2]
SIMULATED = REPOSITORY / "tests" / "support" / "simulated_npu"
# The simulated NPU is a backend in Python.
needs_simulated_npu = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} cannot have a backend in Python, as the simulated NPU is one",
)


def environment(**settings: str) -> dict[str, str]:
    """Of a child process in which the simulated NPU exists."""
    path = os.pathsep.join(filter(None, (str(SIMULATED), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **settings}


def run_all(folder: Path, runs: dict[str, list[str]], **settings: str) -> dict[str, dict]:
    """What came of runs in a process of their own, by name: code, log, attention, calls."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    command = [sys.executable, __file__, str(file)]
    done = subprocess.run(
        command, env=environment(**settings), cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "runs.json.done").read_text())
    return {name: {**of, "log": (folder / f"{name}.log").read_text()} for name, of in results.items()}


def main(file: Path) -> None:
    """Run what the file lists."""
    sys.path.insert(0, str(REPOSITORY))
    import numpy as np
    import torch_npu.tensor

    import run_glue
    from bert_glue.model import attention

    results = {}
    for name, words in json.loads(file.read_text()).items():
        random.seed(0)
        np.random.seed(0)
        torch.npu.manual_seed(0)
        attention.PATHS_TAKEN.clear()
        torch_npu.tensor.CALLS.clear()
        with open(file.parent / f"{name}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
            code = run_glue.main(words)
        results[name] = {"code": code, "attention": sorted(attention.PATHS_TAKEN), "calls": torch_npu.tensor.CALLS}
        results[name]["calls"] = dict(torch_npu.tensor.CALLS)
    file.with_name(file.name + ".done").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
