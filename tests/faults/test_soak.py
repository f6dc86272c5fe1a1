"""Memory of a long run: flat after the warm-up, with saves, evaluations and log lines going on."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from jobs import Job, argv_of
from tiny_run import arguments, make_data, make_model


def resident(pid: int) -> int:
    """Resident memory, bytes; 0 once the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) * 1024 if found else 0


def watch(job: Job, steps: int) -> dict[int, int]:
    """Resident bytes by the step last logged."""
    seen: dict[int, int] = {}
    at = 0
    while at < steps:
        time.sleep(0.01)
        logged = re.findall(r"(?m)^step=(\d+) ", job.text())
        at, memory = (int(logged[-1]) if logged else 0), resident(job.pid)
        if not memory:
            break
        seen[at] = memory
    return seen


@pytest.mark.parametrize(("steps", "tolerance"), [(300, 0.02), pytest.param(2000, 0.01, marks=pytest.mark.slow)])
def test_memory_is_flat_after_the_warm_up(server, tmp_path, report, steps, tolerance):
    """The first fifth is the warm-up; of the rest no quarter may hold more than the first one by the tolerance."""
    model = make_model(tmp_path / "model", dropout=0.1)
    args = arguments(
        tmp_path, model_name_or_path=str(model), max_steps=steps, save_strategy="steps", save_steps=steps // 20,
        save_total_limit=2, eval_strategy="steps", eval_steps=steps // 10, logging_steps=10,
        **make_data(tmp_path / "data", train=400, validation=60),
    )  # fmt: skip
    job = server.start(argv_of(args), tmp_path, entry="main")
    seen = watch(job, steps)
    assert job.wait() == 0, job.text()[-2000:]
    late = {step: memory for step, memory in seen.items() if steps // 5 <= step < steps}
    assert len(late) > 20
    quarter = (steps - steps // 5) // 4
    peaks = [
        max(memory for step, memory in late.items() if (step - steps // 5) // quarter == part)
        for part in range(4)
    ]  # fmt: skip
    growth = max(peaks[1:]) / peaks[0] - 1
    assert growth < tolerance, peaks
    report(f"{steps} steps: {peaks[0] / 2**20:.1f} MiB after the warm-up, growth {100 * growth:.2f} %")
