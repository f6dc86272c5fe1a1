"""benchmarks/gpu.py: its checks can fail, its stages end in time, and its verdict is arithmetic. No GPU is needed."""

from __future__ import annotations

import json
import subprocess
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fake_cuda_graph import batched_kernel, stand_in

from benchmarks import common, estimates, gpu, steps, throughput
from benchmarks.gpu_stages import attention as attention_stage
from benchmarks.gpu_stages import runs as runs_stage
from benchmarks.gpu_stages import speed
from benchmarks.gpu_stages.random_runs import Setting, train
from bert_glue.devices import device
from bert_glue.model import attention
from tools import make_measurements


@pytest.fixture
def rows(tmp_path):
    """Rows of a tiny stage."""
    return common.StageRows(tmp_path / "rows.jsonl", "stage", is_tiny=True)


@pytest.fixture
def recordable(monkeypatch):
    """A CPU that attends as CUDA does and whose work can be recorded."""
    stand_in(monkeypatch)
    yield
    attention.cuda_kernel.cache_clear()


# ---- rows and stages ----


def test_a_failure_is_a_row_and_the_stage_goes_on(rows):
    with rows.row("broken", kernel="a") as found:
        found["forward"] = 0.5
        raise RuntimeError("CUDA error: an illegal memory access")
    with rows.row("sound"):
        pass
    rows.skip("later", "no bf16 here")
    first, second, third = common.read_rows(rows.file)
    assert (first["ok"], first["kernel"], first["forward"]) == (False, "a", 0.5)
    assert first["error"] == "RuntimeError: CUDA error: an illegal memory access" and "test_gpu" in first["where"]
    assert (second["ok"], third["ok"], third["reason"]) == (True, None, "no bf16 here")


def test_a_row_that_has_no_time_is_said_and_not_measured(tmp_path):
    rows = common.StageRows(tmp_path / "rows.jsonl", "stage", seconds=5.0)
    assert rows.has_time(4.0, "short") and not rows.has_time(6.0, "long", batch=256)
    (row,) = common.read_rows(rows.file)
    assert (row["name"], row["batch"], row["ok"], row["reason"]) == ("long", 256, None, "no time was left")


def test_a_stage_that_hangs_is_killed_with_its_children_and_one_that_crashes_is_said(tmp_path):
    hangs = subprocess.Popen(["bash", "-c", "sleep 60 & sleep 60"], start_new_session=True)
    crashes = subprocess.Popen(["bash", "-c", "kill -SEGV $$"], start_new_session=True)
    crashes.wait()
    now = time.monotonic()
    running = {"hangs": (hangs, now - 9, 5.0), "crashes": (crashes, now, 5.0)}
    gpu._end_finished(running, tmp_path)
    found = {row["stage"]: row for row in common.read_rows(tmp_path / gpu.ROWS_FILE)}
    assert not running and found["hangs"]["error"] == "killed after 5 s"
    assert found["crashes"]["error"] == "ended with code -11; crashes.log has its last words"
    assert [found[name]["ok"] for name in ("hangs", "crashes")] == [False, False]
    assert (found["hangs"]["exit_code"], found["crashes"]["exit_code"]) == (-9, -11)
    with pytest.raises(ProcessLookupError):  # no process of its group is left
        for _ in range(50):
            subprocess.os.killpg(hangs.pid, 0)
            time.sleep(0.1)


def test_timings_run_alone_and_checks_side_by_side(tmp_path, monkeypatch):
    """Each stage is a process that notes when it began and ended."""
    log = tmp_path / "log"

    def start(name, out, seconds, is_tiny):
        script = f'echo "{name} begins" >>{log}; sleep 0.4; echo "{name} ends" >>{log}'
        return subprocess.Popen(["bash", "-c", script], start_new_session=True)

    monkeypatch.setattr(gpu, "_start", start)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 4)
    gpu.run_stages(["attention", "models", "base", "large"], tmp_path, time.monotonic() + 60, is_tiny=False)
    lines = log.read_text().splitlines()
    assert {lines[0], lines[1]} == {"attention begins", "models begins"}
    assert lines[4:] == ["base begins", "base ends", "large begins", "large ends"]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    host = {"stage": "machine", "name": "device", "ok": True, "is_host": True}
    monkeypatch.setattr(gpu, "run_stages", lambda names, out, *_: common.append(out / gpu.ROWS_FILE, host))
    assert gpu.main(["--out", str(tmp_path)]) == 4
    assert capsys.readouterr().err == "error: torch finds no GPU here; --tiny runs the flow on a CPU\n"
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--stages", "base,huge"])
    assert "--stages huge: choose from machine, " in capsys.readouterr().err


# ---- the checks ----


def _shifted(query, key, value, q_ends, k_ends, *rest):
    """Attention with each border one token too far."""
    return batched_kernel(query, key, value, q_ends, (k_ends + 1).clamp(max=k_ends[-1]), *rest)


def _masks_of_the_backward_pass(query, key, value, *given):
    """Dropout whose backward pass draws other masks than its forward pass."""

    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *parts):
            ctx.save_for_backward(*parts)
            return batched_kernel(*parts, *given)

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                parts = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(batched_kernel(*parts, *given), parts, gradient)

    return Other.apply(query, key, value)


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        (batched_kernel, set()),
        (_shifted, {"attention against float64", "dropout of attention"}),
        (_masks_of_the_backward_pass, {"dropout of attention"}),
    ],
)
def test_kernels_are_checked_and_a_wrong_one_is_found(rows, recordable, monkeypatch, kernel, wrong):
    monkeypatch.setattr(attention, "CUDA_KERNELS", {"stand-in": (kernel, True)})
    monkeypatch.setattr(attention_stage, "DTYPES", {"fp32": torch.float32})
    attention_stage.check_attention(rows)
    found = common.read_rows(rows.file)
    assert {row["kernel"] for row in found} == {"chosen", "stand-in"} and len(found) == 5
    assert {row["name"] for row in found if not row["ok"]} == wrong


def test_recorded_runs_are_compared_with_eager_ones(rows, recordable, monkeypatch):
    runs_stage.check_recorded(rows)
    (row,) = common.read_rows(rows.file)
    assert row["ok"] and row["losses_equal"] and row["replayed_passes"] > 0
    one, other = (train(Setting(batch=4, steps=2, skip=0), seed=seed, logging_steps=1) for seed in (1, 2))
    found = runs_stage.compared(one, other)
    assert not found["losses_equal"] and not found["weights_equal"] and found["first_difference_at"] == 1


def test_kernels_have_shares_by_their_names():
    times = {"void flash_fwd_splitkv": 2.0, "sm90_xmma_gemm_bf16": 5.0, "elementwise_kernel": 1.0, "FusedAdamW": 2.0}
    assert speed.kernel_shares(times) == {
        "attention": 0.2, "products": 0.5, "update": 0.2, "embeddings": 0.0, "copies": 0.0, "pointwise": 0.1
    }  # fmt: skip


# ---- the verdict ----


def _ours(batch: int, rate: float, how: str = "recorded", shape: str = "bert-base", **changes) -> dict:
    row = {
        "stage": shape.removeprefix("bert-"), "name": "ours", "shape": shape, "batch": batch, "lengths": [25, 85],
        "how": how, "precision": "bf16", "level": "O2", "dropout": 0.1, "ok": True, "samples_per_second": rate,
        "real_tokens_per_second": 55 * rate, "peak_bytes": 2e9,
    }  # fmt: skip
    return {**row, **changes}


def _measured() -> list[dict]:
    """Rows as an H100 might give: bert-base reaches its target at batch 32 alone."""
    found = [_ours(32, 4000, "eager"), _ours(32, 5500), _ours(256, 10_450), _ours(256, 9000, "eager")]
    for task, rate in (("cola", 9000), ("rte", 4000)):
        found.append(_ours(32, rate, stage="tasks", task=task))
        for how, slower in (("its default", 6), ("its best", 2.5 if task == "cola" else 1.6)):
            row = _ours(32, rate / slower, how, stage="tasks", task=task, level=None)
            found.append({**row, "name": "stock Trainer"})
    single = {"stage": "padded", "precision": "fp32", "level": "O0"}
    return [*found, _ours(32, 900, "eager", **single), _ours(32, 300, "eager, padded", **single)]


def test_the_verdict_names_what_is_reached_and_by_how_much_the_rest_is_missed():
    machine = {"stage": "machine", "name": "device", "device": "NVIDIA H100 80GB HBM3", "packages": {}, "ok": True}
    content = gpu.content_of([machine, *_measured()], False, 400.0)
    found = {target["what"]: (target["measured"], target["reached"], target["by"]) for target in content["verdict"]}
    assert found["bert-base, batch 32"] == (5500, True, "recorded")
    assert found["bert-base, batch 256"] == (10_450, False, "recorded")
    assert found["bert-large, batch 32"] == (None, None, "")
    assert found["fp32, packed against padded to 128"] == (3.0, True, "eager")
    ratios = [found[f"every task, bert-base, batch 32, against the stock Trainer, {how}"] for how in gpu.RATIOS]
    assert ratios[0] == (pytest.approx(6), True, ratios[0][2]) and ratios[1] == (pytest.approx(1.6), False, "rte")
    lines = gpu.table(content).splitlines()
    assert "| bert-base, batch 256 | 11,000 samples/s | 10,450 samples/s, recorded | missed by 5.0 % |" in lines
    assert "| bert-large, batch 32 | 1,900 samples/s | - | not measured |" in lines
    assert "| bert-base, stock Trainer | 32 | 25 to 85 | its best, bf16 | 3,600 | 198,000 | 2.0 |" in lines


def test_what_is_wrong_is_said_first_and_a_tiny_run_has_no_figures():
    wrong = {"stage": "attention", "name": "attention against float64", "kernel": "flash", "ok": False}
    content = gpu.content_of([wrong, *_measured()], True, 40.0)
    text = gpu.table(content)
    assert "- wrong: attention: attention against float64, flash: beyond its limit" in text
    assert all(target["measured"] is None for target in content["verdict"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100.json"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie.json"),
        ("NVIDIA A100-SXM4-40GB", "nvidia-a100.json"),
        ("NVIDIA GeForce RTX 4090", "nvidia-rtx-4090.json"),
    ],
)
def test_the_file_is_named_after_the_device(name, expected):
    assert gpu.file_name(name) == expected


def test_a_results_file_takes_the_place_of_the_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "MEASURED", tmp_path)
    assert "estimate" in make_measurements._gpus() and "not measured" not in make_measurements._gpus()
    packages = {"torch": "2.11.0", "transformers": "5.17.0"}
    machine = {"name": "device", "stage": "machine", "device": "NVIDIA H100", "packages": packages, "ok": True}
    rows = [machine, *_measured()]
    (tmp_path / "nvidia-h100.json").write_text(json.dumps(gpu.content_of(rows, False, 400.0)))
    (tmp_path / "cpu.json").write_text('{"reports": []}')
    section = make_measurements._gpus()
    assert "### NVIDIA H100\n" in section and "torch 2.11.0" in section and "estimate" not in section
    own = estimates.rates("bert-base")
    assert own.is_measured and own.step(55 * 32) == pytest.approx(32 / 5500)
    assert own.step(55 * 256) == pytest.approx(256 / 10_450)
    assert not estimates.rates("bert-large").is_measured  # one shape alone was measured


# ---- the queue ----


def _run(before: float, device: float, after: float = 0.0) -> estimates.QueuedRun:
    return estimates.QueuedRun("run", before, device, after)


@pytest.mark.parametrize(
    ("runs", "slots", "expected"),
    [
        ([], 3, 0.0),
        ([_run(2, 5, 1)], 1, 8.0),
        ([_run(2, 5, 1)] * 3, 1, 24.0),
        # Two begin at 2 and share the device until 12; the third prepares from 13 to 15 and has it alone.
        ([_run(2, 5, 1)] * 3, 2, 21.0),
        ([_run(2, 5, 1)] * 3, 3, 18.0),
        # The long one has the device alone from 1 to 3 and from 7 on: 10 - 2 - 2 = 6 more seconds.
        ([_run(1, 10), _run(3, 2)], 2, 13.0),
    ],
)
def test_a_queue_shares_the_device_in_turns(runs, slots, expected):
    assert estimates.queue_seconds(runs, slots) == pytest.approx(expected)


def test_more_runs_at_once_never_beat_the_devices_own_seconds():
    queue = estimates.glue_queue("bert-base", estimates.estimated_rates("bert-base"), 3)
    busy = sum(run.device for run in queue)
    seconds = [round(estimates.queue_seconds(queue, slots), 6) for slots in (1, 2, 4, 8, 27)]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] > busy
    assert seconds[0] == pytest.approx(sum(run.before + run.device + run.after for run in queue))


def test_the_estimate_of_a_step_is_a_line_through_both_batches():
    own = estimates.estimated_rates("bert-large")
    for step in (step for step in estimates.STEPS if step.shape == "bert-large"):
        assert own.step(step.tokens) == pytest.approx(step.milliseconds / 1000)


# ---- steps.py and throughput.py on a device ----


def test_a_device_has_one_way_of_a_step_alive_at_a_time(monkeypatch):
    alive, most = set(), []

    class Way:
        first_seconds = 1.0

        def __init__(self, args, split, drop, how, kernel):
            self.key = (drop, how, kernel)
            alive.add(self.key)
            most.append(len(alive))

        def __del__(self):
            alive.discard(self.key)

        def seconds(self):
            return 1.0, 1.0

        def filler(self):
            return 0.0

    monkeypatch.setattr(steps, "Way", Way)
    found = [(drop, how, "") for drop in (0.0, 0.1) for how in ("eager", "recorded")]
    monkeypatch.setattr(steps, "ways", lambda args: found)
    for is_host, expected in ((False, 1), (True, 4)):
        most.clear()
        seen, about = steps.timed(Namespace(device=SimpleNamespace(is_host=is_host), rounds=2), None)
        assert max(most) == expected and list(seen) == list(about) == found
        assert all(len(seconds) == 2 for seconds in seen.values())
        alive.clear()


def test_a_device_needs_more_steps_because_the_first_are_recorded(monkeypatch, tmp_path):
    asked = ["--model", "M", "--data_path", "D", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(device, "resolve_device", lambda requested: SimpleNamespace(is_host=False))
    args = throughput.parse(asked)
    assert args.rows // 32 == args.default_steps == 120 and args.skip_steps == 60
    words = throughput.command("ours", args, "mrpc", tmp_path, tmp_path, False)
    assert words[words.index("--skip_steps") + 1] == "60"
    assert throughput.parse([*asked, "--rows", "64", "--skip_steps", "1"]).skip_steps == 1
