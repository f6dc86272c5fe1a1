"""The whole recipe on the simulated NPU, black box: `run_glue.py --device npu` in processes of its own.

What is proved is which calls are made, in which order and with what result, never kernels or speed.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fused_checks import check_fused_semantics, fused_semantics
from safetensors.numpy import load_file
from simulated_runs import environment, needs_simulated_npu, run_all
from tiny_run import REPOSITORY, arguments, bert_tensors, flags_of, make_label_sets, make_model

pytestmark = needs_simulated_npu

TND = "npu_fusion_attention.TND"
PACKED, PADDED = "packed: npu_fusion_attention, TND", "padded inside attention only"


def settings(folder: Path, name: str, **changes) -> list[str]:
    """Command line of a short run on the device, results in `folder/name`."""
    defaults = {"use_cpu": False, "device": "npu", "output_dir": str(folder / name), "per_device_train_batch_size": 8}
    return flags_of(arguments(folder, **{**defaults, **changes}))


def results(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "all_results.json").read_text())


def losses(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


O2 = {"fp16": True, "fp16_opt_level": "O2"}
FUSED = {"optim": "adamw_torch_npu_fused"}
PARTS = {"lora": {"lora_rank": 3}, "frozen": {"freeze_encoder": True}}
PRECISIONS = {
    "O0 fp32": {},
    "O1 fp16, loss scale 1024": {"fp16": True},
    "O1 fp16, loss scale dynamic": {"fp16": True, "loss_scale": "dynamic"},
    "O1 bf16": {"bf16": True},
    "O2 fp16, loss scale 1024": O2,
    "O2 fp16, loss scale dynamic": {**O2, "loss_scale": "dynamic"},
    "O2 bf16": {"bf16": True, "fp16_opt_level": "O2"},
    "O3 fp16": {"fp16": True, "fp16_opt_level": "O3"},
    "O3 bf16": {"bf16": True, "fp16_opt_level": "O3"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("npu")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict]:
    """One process on a 910B: every precision, the fused optimizers, runs that are resumed, and the host."""
    everything = {"do_eval": True, "do_predict": True}
    lines = {name: settings(folder, name, **flags) for name, flags in PRECISIONS.items()}
    lines["O0 fp32"] = settings(folder, "O0 fp32", **everything)
    lines["host"] = settings(folder, "host", **everything, device="cpu")
    lines["fused"] = settings(folder, "fused", **FUSED, strict_optim=True)
    lines["apex fused"] = settings(folder, "apex fused", optim="adamw_apex_fused_npu", use_combine_grad=True)
    lines["second"] = settings(folder, "second", device="npu:1", max_steps=1, profile_steps="1:1")
    make_model(folder / "noisy", dropout=0.1)
    for name, flags in {"O2": {**O2, "loss_scale": "dynamic"}, "fused": FUSED}.items():
        run = {**flags, "model_name_or_path": str(folder / "noisy"), "save_strategy": "steps", "save_steps": 3}
        lines[f"whole {name}"] = settings(folder, f"whole {name}", **run)
        lines[f"resumed {name}"] = settings(
            folder, f"resumed {name}", **run, resume_from_checkpoint=str(folder / f"whole {name}" / "checkpoint-3")
        )
    several = {**everything, **make_label_sets(folder / "sets"), "calibrate": True, "class_weights": "balanced"}
    lines["several"] = settings(folder, "several", **several)
    lines["several, host"] = settings(folder, "several, host", **several, device="cpu")
    lines["several, low"] = settings(folder, "several, low", **{**several, **O2, **FUSED})
    for name, flags in PARTS.items():
        lines[name] = settings(folder, name, **everything, **flags)
        lines[f"{name}, host"] = settings(folder, f"{name}, host", **everything, **flags, device="cpu")
        low = {**flags, **O2, **FUSED, "hidden_dropout_prob": 0.1, "save_strategy": "steps", "save_steps": 3}
        lines[f"{name}, low"] = settings(folder, f"{name}, low", **low)
        back = {"resume_from_checkpoint": str(folder / f"{name}, low" / "checkpoint-3")}
        lines[f"{name}, resumed"] = settings(folder, f"{name}, resumed", **low, **back)
    return run_all(folder, {**lines, **overflowing(folder)})


def test_all_end_well(runs: dict[str, dict]) -> None:
    assert {name: run["code"] for name, run in runs.items() if run["code"]} == {"static": 5}, runs


def test_several_labels_a_row_give_what_the_host_gives(runs: dict[str, dict], folder: Path) -> None:
    device, host = results(folder, "several"), results(folder, "several, host")
    assert runs["several"]["attention"] == [PACKED] and device["device"] == "npu:0"
    assert losses(folder, "several") == pytest.approx(losses(folder, "several, host"), rel=1e-4)
    for name in ("eval_loss", "eval_f1_micro", "eval_subset_accuracy", "eval_calibrated_loss"):
        assert device[name] == pytest.approx(host[name], rel=1e-3), name
    files = [(folder / name / "predict_results_own.txt").read_text() for name in ("several", "several, host")]
    assert files[0] == files[1]
    low = losses(folder, "several, low")
    assert low[0] == pytest.approx(losses(folder, "several, host")[0], rel=0.02)


def test_the_device_is_called_simulated(runs: dict[str, dict], folder: Path) -> None:
    assert "device: npu:0 (simulated Ascend910B1), 1 rank(s)" in runs["O0 fp32"]["log"]
    assert results(folder, "O0 fp32")["device"] == "npu:0"
    for file in ("all_results.json", "run.json", "README.md", "report.html"):
        assert "simulated Ascend910B1" in (folder / "O0 fp32" / file).read_text(), file
    assert "device: npu:1 (simulated" in runs["second"]["log"]
    assert results(folder, "second")["device"] == "npu:1"


def test_steps_are_traced_by_torch_npus_profiler(runs: dict[str, dict], folder: Path) -> None:
    """Its host part only: the simulated device has no activity of its own."""
    trace = json.loads((folder / "second" / "trace-0.json").read_text())
    assert "optimizer step 1" in {event.get("name") for event in trace["traceEvents"]}
    assert "trace: optimizer steps 1 to 1" in runs["second"]["log"]


def test_the_recipe_equals_the_hosts(runs: dict[str, dict], folder: Path) -> None:
    """Losses, evaluation and predictions; attention is the packed kernel's, in training and in evaluation."""
    assert losses(folder, "O0 fp32") == pytest.approx(losses(folder, "host"), abs=2e-5)
    npu, host = results(folder, "O0 fp32"), results(folder, "host")
    keys = [key for key in host if key.startswith("eval_") and "second" not in key and "runtime" not in key]
    keys.remove("eval_classes")  # nested, and made of the same predictions as the macro means
    assert len(keys) > 2 and {key: npu[key] for key in keys} == pytest.approx(
        {key: host[key] for key in keys}, abs=1e-4
    )
    predicted = [next((folder / name).glob("predict_results_*.txt")).read_text() for name in ("O0 fp32", "host")]
    assert predicted[0] == predicted[1] and predicted[0].count("\n") > 4
    assert runs["O0 fp32"]["attention"] == [PACKED] and runs["O0 fp32"]["calls"][TND] > 10
    assert runs["host"]["calls"].get(TND) is None


@pytest.mark.parametrize("name", PRECISIONS)
def test_each_precision(runs: dict[str, dict], folder: Path, name: str) -> None:
    assert results(folder, name)["precision"] == name and f"precision: {name};" in runs[name]["log"]
    assert runs[name]["attention"] == [PACKED]
    # At O3 every update is rounded to 16 bits.
    assert losses(folder, name) == pytest.approx(losses(folder, "O0 fp32"), rel=0.3 if name.startswith("O3") else 0.05)
    if name != "O0 fp32":
        assert losses(folder, name) != losses(folder, "O0 fp32")


@pytest.mark.parametrize("name", ["fused", "apex fused"])
def test_fused_optimizers(runs: dict[str, dict], folder: Path, name: str) -> None:
    """torch_npu's class stands in for Ascend apex's, which steps under apex's amp only; gradients stay its own."""
    assert "optimizer: adamw_torch_npu_fused" in runs[name]["log"]
    assert losses(folder, name) == pytest.approx(losses(folder, "O0 fp32"), abs=2e-5)


@pytest.mark.parametrize("name", ["O2", "fused"])
def test_resume_is_bit_exact(runs: dict[str, dict], folder: Path, name: str) -> None:
    """With dropout, whose masks come from the device's own generator."""
    assert runs[f"whole {name}"]["calls"]["aten.native_dropout.default"] > 0
    assert "resumed after step 3" in runs[f"resumed {name}"]["log"]
    assert same(folder / f"whole {name}", folder / f"resumed {name}")
    assert losses(folder, f"whole {name}") == losses(folder, f"resumed {name}")


@pytest.mark.parametrize("name", PARTS)
def test_adapters_or_the_head_alone(runs: dict[str, dict], folder: Path, name: str) -> None:
    """As on the host; in low precision with the fused optimizer too, and resumed bit for bit."""
    assert losses(folder, name) == pytest.approx(losses(folder, f"{name}, host"), abs=2e-5)
    assert runs[name]["attention"] == [PACKED]
    ours, host = (weights(folder / at) for at in (name, f"{name}, host"))
    assert all(abs(ours[key] - host[key]).max() < 1e-4 for key in host)
    moved = {key for key, value in bert_tensors().items() if (ours[key] != value).any() and "pooler" not in key}
    assert all(key.endswith(("query.weight", "value.weight")) for key in moved) and bool(moved) == (name == "lora")
    assert losses(folder, f"{name}, low") == pytest.approx(losses(folder, name), rel=0.05)
    assert same(folder / f"{name}, low", folder / f"{name}, resumed")


# Chips that differ


def overflowing(folder: Path) -> dict[str, list[str]]:
    """Runs whose fp16 gradients leave the range: at the first dynamic scales, and at a static one."""
    last, pooler = "bert.encoder.layer.1.output.LayerNorm.weight", "bert.pooler.dense.weight"
    plain = bert_tensors()
    steep = {last: 1000.0 * plain[last], pooler: plain[pooler] / 1000.0}  # the pooler's gradient is 1000 times larger
    make_model(folder / "steep", changes=steep)
    run = {**O2, "model_name_or_path": str(folder / "steep"), "learning_rate": 1e-4}
    return {
        "dynamic": settings(folder, "dynamic", **run, loss_scale="dynamic"),
        "static": settings(folder, "static", **run, loss_scale="1e6", max_steps=1),
    }


@pytest.fixture(scope="module")
def old_chip(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """One process on a 910A: no bf16, no TND, saturating."""
    folder = tmp_path_factory.mktemp("910A")
    lines = {
        "plain": settings(folder, "plain", **O2, loss_scale="dynamic", do_eval=True),
        "bf16": settings(folder, "bf16", bf16=True),
        "fallback": settings(folder, "fallback", bf16=True, fallback_precision="fp32", max_steps=1),
        **overflowing(folder),
    }
    return folder, run_all(folder, lines, SIMULATED_NPU_CHIP="910A")


def test_a_chip_without_packed_attention_pads_inside_attention(old_chip, runs, folder: Path) -> None:
    own, done = old_chip
    assert done["plain"]["code"] == 0, done["plain"]["log"]
    assert [path.split(":")[0] for path in done["plain"]["attention"]] == [PADDED]
    assert done["plain"]["calls"].get(TND) is None
    assert results(own, "plain")["device_name"] == "simulated Ascend910A"
    assert results(own, "plain")["train_skipped_updates"] == 0
    assert losses(own, "plain") == pytest.approx(losses(folder, "O2 fp16, loss scale dynamic"), rel=0.01)


def test_an_overflow_that_saturates_is_seen(old_chip, runs, folder: Path) -> None:
    """On a chip that gives the largest number instead of inf, as on one that gives inf."""
    own, done = old_chip
    skipped = results(own, "dynamic")["train_skipped_updates"]
    assert 0 < skipped == results(folder, "dynamic")["train_skipped_updates"] < 8
    assert done["dynamic"]["log"].count("grad_norm=None") == skipped
    assert losses(own, "dynamic") == pytest.approx(losses(folder, "dynamic"), rel=0.01)
    for run in (done["static"], runs["static"]):
        assert run["code"] == 5 and "gradients are not finite" in run["log"]
    assert results(own, "plain")["train_skipped_updates"] == 0  # and only a real one


def test_a_chip_without_bf16_refuses_it_or_falls_back(old_chip) -> None:
    own, done = old_chip
    assert done["bf16"]["code"] == 4 and "no native support" in done["bf16"]["log"]
    assert done["fallback"]["code"] == 0 and results(own, "fallback")["precision"] == "O0 fp32"


# Two ranks, as torchrun starts them


def two_ranks(words: list[str], **more: str) -> list[str]:
    """Output of both ranks of one run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
        children.append(
            subprocess.Popen(
                [sys.executable, str(REPOSITORY / "run_glue.py"), *words],
                env=environment(**variables), cwd=REPOSITORY, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    logs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], logs
    return logs


@pytest.mark.slow
def test_two_ranks_equal_one(runs: dict[str, dict], folder: Path, tmp_path: Path) -> None:
    """hccl between npu:0 and npu:1; half the batch each."""
    name = "two ranks"
    words = settings(folder, name, per_device_train_batch_size=4, do_eval=True, do_predict=True)
    log, _ = two_ranks(words, SIMULATED_NPU_CALLS=str(tmp_path / "calls"))
    assert "device: npu:0 (simulated Ascend910B1), 2 rank(s)" in log
    assert losses(folder, name) == pytest.approx(losses(folder, "O0 fp32"), abs=2e-5)
    one, two = results(folder, "O0 fp32"), results(folder, name)
    assert two["world_size"] == 2 and two["eval_accuracy"] == one["eval_accuracy"]
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-4)
    for rank in range(2):
        assert json.loads((tmp_path / f"calls.{rank}").read_text())[TND] > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["O2 fp16, loss scale dynamic", "O2 bf16", "O1 fp16, loss scale 1024"])
def test_two_ranks_in_low_precision(runs: dict[str, dict], folder: Path, name: str) -> None:
    words = settings(folder, f"two {name}", per_device_train_batch_size=4, **PRECISIONS[name], **FUSED)
    two_ranks(words)
    assert losses(folder, f"two {name}") == pytest.approx(losses(folder, name), rel=0.02)


@pytest.mark.slow
def test_two_ranks_skip_the_same_steps_on_a_chip_that_saturates(old_chip) -> None:
    """The overflow of one rank reaches no gradient of the other, and a sum can overflow although no rank did."""
    own, _ = old_chip
    words = overflowing(own)["dynamic"]
    words[words.index("--output_dir") + 1] = str(own / "two")
    words += ["--per_device_train_batch_size", "4"]
    two_ranks(words, SIMULATED_NPU_CHIP="910A")
    assert results(own, "two")["train_skipped_updates"] > 0
    assert losses(own, "two") == pytest.approx(losses(own, "dynamic"), rel=0.02)


# The fused optimizer's buffer


def test_gradients_stay_where_the_fused_optimizer_looks() -> None:
    report = fused_semantics()
    assert report["class"] == "torch_npu.optim.modelled.NpuFusedAdamW"
    check_fused_semantics(report)


def test_without_a_device_the_simulated_npu_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "run_glue.py"), *settings(tmp_path, "out")]
    done = subprocess.run(
        command, env=environment(SIMULATED_NPU_DEVICES="0"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 4 and "npu-smi info" in done.stderr and "Traceback" not in done.stderr
