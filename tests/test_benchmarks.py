"""What the benchmark scripts compute from measurements: ratios inside a round, means, intervals, tables."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from fake_cuda_graph import Tape, batched_kernel
from scipy import stats
from tiny_models import write_model
from tiny_run import make_data

from benchmarks import adapters, combine, common, gpu, hf_recipe, processor, quality, recipe_quality, steps, throughput
from bert_glue.config.arguments import Arguments
from bert_glue.data.sources import load_task_data
from bert_glue.devices import cpu, device
from bert_glue.devices.device import Device
from bert_glue.model import attention
from bert_glue.training import cuda_graphs


def _figures(rate: float, share: float | None = None) -> dict:
    figures = {"real_tokens_per_second": rate, "seconds_to_first_step": 2.0, "seconds_to_end": None, "peak_bytes": 10}
    return {**figures, "eval_tokens_per_second": None, "share_of_gemm": share}


def test_a_ratio_is_formed_inside_its_round():
    """The machine runs at half speed in the second round, and ours is 4, 6 and 8 times as fast."""
    rounds = [
        {"ours": _figures(400, 0.5), "hf_default": _figures(100)},
        {"ours": _figures(300, 0.6), "hf_default": _figures(50)},
        {"ours": _figures(800, 0.7), "hf_default": _figures(100)},
    ]
    found = throughput.ratios(rounds)
    assert found["real_tokens_per_second_vs_hf_default"] == 6.0
    assert found["seconds_to_first_step_vs_hf_default"] == 1.0
    assert found["share_of_gemm"] == 0.6
    assert not [key for key in found if "hf_best" in key or "seconds_to_end" in key]  # not measured, not invented
    line = throughput.table({"tasks": {"cola": {"rounds": rounds}}}).splitlines()[-1]
    assert line.startswith("| cola | 6.00x | - | 400 | 60 % | - | 1.00x | - | 1.00x | - |")


def test_rows_are_a_random_part_of_both_splits(tmp_path):
    words = [f"{chr(97 + i % 26)}{i}" for i in range(200)]
    (tmp_path / "glue" / "MRPC").mkdir(parents=True)
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    lines = [f"{i % 2}\t{i}\t{i}\t{word} first\t{word} second" for i, word in enumerate(words)]
    for split in ("train", "dev"):
        (tmp_path / "glue" / "MRPC" / f"{split}.tsv").write_text("\n".join([header, *lines]) + "\n")
    run_as, folder = throughput.write_rows(tmp_path / "part", "mrpc", str(tmp_path / "glue"), 30)
    assert run_as == "mrpc"
    data = load_task_data(Arguments(task_name="mrpc", data_path=str(folder)), frozenset({"train", "evaluation"}))
    assert set(data.splits) == {"train", "validation"}
    for split in data.splits.values():
        at = [words.index(text.split()[0]) for text in split.texts[0]]
        assert len(set(at)) == 30 and at != sorted(at)
        assert split.labels == [i % 2 for i in at]
        assert [text.split()[0] for text in split.texts[1]] == [words[i] for i in at]


def _row(run: str, seed: int, score: float | None) -> dict:
    return {"task": "mrpc", "run": run, "seed": seed, "scores": {"f1": score}}


def test_the_interval_is_students_over_common_seeds():
    ours, theirs = {1: 0.80, 2: 0.84, 3: 0.82, 9: 0.1}, {1: 0.81, 2: 0.82, 3: 0.80}
    differences = [-1.0, 2.0, 2.0]
    low, high = stats.t.interval(0.95, 2, statistics.mean(differences), stats.sem(differences))
    assert common.difference(ours, theirs) == f"+1.0 ± {(high - low) / 2:.1f}"
    assert common.difference({1: 0.5}, {1: 0.4}) == "+10.0 (one seed)"
    assert common.difference({1: 0.5}, {}) == "-"


def test_the_quality_table_and_the_rows_already_there(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert common.read_rows(file) == []
    rows = [_row("ours", 1, 0.80), _row("ours", 2, 0.90), _row("hf", 1, 0.80), _row("hf", 2, 0.80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = quality.table(common.read_rows(file)).splitlines()[-1]
    assert line.startswith("| mrpc | 115 | f1 | 2 | 85.0 ± 7.1 | 80.0 ± 0.0 | +5.0 ± 63.5 | - | - |")


def test_adapters_are_measured_against_all_weights(monkeypatch):
    pytest.importorskip("peft")
    shape = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 64,
    }  # fmt: skip
    monkeypatch.setitem(hf_recipe.MODEL_SHAPES, "tiny", shape)
    found = adapters.measure("tiny", [5, 9], 2)
    elements = {mode: figures["optimizer_elements"] for mode, figures in found.items()}
    head = 16 * 16 + 16 + 2 * 16 + 2
    assert elements["frozen"] == head and elements["lora_8"] == head + 2 * 2 * 8 * (16 + 16)
    assert elements["all"] > 8000 * 16 > elements["lora_8_all_linear"]
    assert found["all"]["speedup_cpu_seconds"] == 1.0 and found["frozen"]["speedup_clock"] > 0


def test_what_stable_adds_is_said_against_the_same_choice_of_epoch_too():
    rows = [
        {**_row(run, seed, score + seed / 10), "train_rows": 1000}
        for run, score in (("reference", 0.1), ("reference_best_epoch", 0.2), ("stable", 0.25))
        for seed in (1, 2)
    ]
    line = recipe_quality.table([*rows, {**_row("reference", 3, None), "train_rows": 1000}]).splitlines()[-1]
    assert line == "| mrpc | f1 | 2 | 16.7 ± 15.3 | 35.0 ± 7.1 | 40.0 ± 7.1 | +15.0 ± 0.0 | +5.0 ± 0.0 |"


@pytest.mark.slow
def test_runs_put_together_are_scored_as_a_user_would(tmp_path):
    write_model(tmp_path / "model")
    (tmp_path / "glue" / "MRPC").mkdir(parents=True)
    rows = [f"{i % 2}\t{i}\t{i}\t{'red dog' if i % 2 else 'big cat'}\tthe mat {i % 5}" for i in range(64)]
    text = "\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows]) + "\n"
    for split in ("train", "dev"):
        (tmp_path / "glue" / "MRPC" / f"{split}.tsv").write_text(text)
    asked = ["--model_name_or_path", str(tmp_path / "model"), "--task_name", "mrpc", "--do_train", "--do_eval"]
    asked += ["--data_path", str(tmp_path / "glue"), "--learning_rate", "1e-2", "--max_steps", "40", "--use_cpu"]
    runs = [str(tmp_path / f"run{seed}") for seed in (1, 2)]
    for seed, run in enumerate(runs):
        common.finish([sys.executable, "run_glue.py", *asked, "--seed", str(seed), "--output_dir", run], 1)
    row = combine.measure(runs, str(tmp_path / "glue"))
    assert (row["task"], row["runs"], row["steps"]) == ("mrpc", 2, 40)
    assert all(set(found) == {"accuracy", "f1"} for found in (*row["alone"], row["soup"], row["ensemble"]))
    assert row["ensemble"] == {"accuracy": 1.0, "f1": 1.0} == row["alone"][0]
    line = combine.table([row]).splitlines()[-1]
    assert line.startswith("| mrpc | 40 | f1 | 2 | 100.0 ± 0.0 | 100.0 | ") and line.endswith(" | 100.0 |")


@pytest.fixture
def tiny_steps(tmp_path):
    """Settings of benchmarks/steps.py for a tiny model on the CPU."""
    write_model(tmp_path / "tiny", vocab_size=8000)
    return Namespace(
        model=str(tmp_path / "tiny"), device=Device("cpu"), lengths="3:20", rows=4, batches=2, rounds=2, bf16=False,
        backend="aot_eager", mode=None,
    )  # fmt: skip


def test_ways_of_a_step_on_a_cpu(tiny_steps):
    found = steps.measure(tiny_steps)
    assert list(found) == [f"{how}, dropout {drop}" for drop in ("0", "0.1") for how in ("eager", "compiled")]
    assert found["eager, dropout 0"]["vs_eager"] == 1.0
    assert found["eager, dropout 0"]["filler"] == 0.0 < found["compiled, dropout 0"]["filler"] < 0.5


def test_ways_of_a_step_on_a_gpu_run_on_stand_ins(tiny_steps, monkeypatch):
    """That the script is ready for one, not what it would find."""
    monkeypatch.setitem(attention.ATTENTION, "cpu", attention.varlen_attention)
    monkeypatch.setattr(attention, "CUDA_KERNELS", {"a": (batched_kernel, False), "b": (batched_kernel, True)})
    monkeypatch.setattr(cuda_graphs, "Recorder", Tape)
    monkeypatch.setattr(Device, "can_record", True)
    attention.cuda_kernel.cache_clear()
    found = steps.measure(tiny_steps)
    attention.cuda_kernel.cache_clear()
    plain = ["eager", "compiled", "recorded", "eager, a", "eager, b", "eager, padded"]
    assert list(found) == [f"{way}, dropout 0" for way in plain] + [
        f"{way}, dropout 0.1" for way in plain if way != "eager, a"
    ]


@pytest.fixture
def few_stages(monkeypatch, tmp_path):
    """Three stages of tiny models over a few rows: two measured, one in bf16 where this CPU has no such products."""
    monkeypatch.setattr(processor, "_WINDOW", 2)
    monkeypatch.setattr(device, "has_slow_products", lambda kind, dtype: dtype == torch.bfloat16)
    reports = []

    def measured(args, keep):
        reports.append(args)
        rounds = [{"ours": _figures(400, 0.5), "hf_best": _figures(100)}]
        return {"tasks": {"mrpc": {"rounds": rounds}}, "settings": {"rows": args.rows, "extra": args.extra}}

    monkeypatch.setattr(throughput, "measure_model", measured)
    monkeypatch.setattr(processor, "resident_by_step", lambda asked, *given: {0: [9, 10], 2: [12]})
    return reports


def test_a_processor_has_one_file_and_keeps_what_is_measured(few_stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processor, "file_name", lambda: "cpu-amd-avx2.json")
    vocab = tmp_path / "vocab.txt"
    asked = ["--model", "M", "--vocab", str(vocab), "--data_path", "D", "--out", str(tmp_path), "--rows", "7"]
    processor.main([*asked, "--stages", "MiniLM, fp32;MiniLM, bf16"])
    content = json.loads((tmp_path / "cpu-amd-avx2.json").read_text())
    assert [report["stage"] for report in content["reports"]] == ["MiniLM, fp32"]
    assert content["left_out"] == {"MiniLM, bf16": "this processor has no bf16 products"}
    assert content["resident_bytes"] == {"MiniLM, fp32": {"0": 10, "2": 12}}
    processor.main(asked)
    content = json.loads((tmp_path / "cpu-amd-avx2.json").read_text())
    assert [report["stage"] for report in content["reports"]] == ["MiniLM, fp32", "bert-base shape, fp32"]
    assert [args.shape for args in few_stages] == [None, "bert-base"]  # the first stage ran once
    assert "4.00x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("vendor", "features", "capability", "expected"),
    [
        ("AuthenticAMD", {"avx2"}, "AVX2", "cpu-amd-avx2.json"),
        ("GenuineIntel", {"amx_bf16"}, "AVX512", "cpu-intel-avx512-amx.json"),
        ("", {"asimd"}, "DEFAULT", "cpu-arm-default.json"),
    ],
)
def test_the_file_is_named_after_the_processor(monkeypatch, vendor, features, capability, expected):
    monkeypatch.setattr(cpu, "vendor", lambda: vendor)
    monkeypatch.setattr(cpu, "features", lambda: frozenset(features))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert processor.file_name() == expected


def test_memory_over_a_run_is_read_by_step(tmp_path):
    write_model(tmp_path / "model")
    data = make_data(tmp_path)
    out = tmp_path / "out"
    asked = [
        sys.executable, "run_glue.py", "--model_name_or_path", str(tmp_path / "model"), "--do_train", "--train_file",
        data["train_file"], "--max_steps", "200", "--logging_steps", "10", "--save_strategy", "no", "--output_dir",
        str(out), "--use_cpu", "--max_seq_length", "16",
    ]  # fmt: skip
    found = common.resident_by_step(asked, 1, 50)
    assert {50, 100, 150} <= set(found) <= {0, 50, 100, 150, 200} and min(map(min, found.values())) > 100 << 20
    with pytest.raises(SystemExit, match=r"ended with 2"):
        common.resident_by_step([*asked, "--no_such_flag"], 1, 50)


# Python's own start-up file: hides packages from imports, and refuses every address but this host's.
_BARE = """
import socket
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("datasets", "evaluate", "pytest")
        return None if hidden else self.finder.find_spec(name, path, target)

def connect(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), f"a connection to {address}"
    return plain(self, address)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
plain, socket.socket.connect = socket.socket.connect, connect
"""


def test_the_gpu_benchmark_runs_as_a_whole_without_network_and_optional_packages(tmp_path):
    """Tiny shapes on a CPU: that each stage runs and ends, not what a GPU would give."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(_BARE)
    path = os.pathsep.join(filter(None, (str(tmp_path / "bare"), os.environ.get("PYTHONPATH"))))
    asked = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "out"), "--tiny"]
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(asked, cwd=common.ROOT, env=environment, capture_output=True, text=True)
    logs = "".join(log.read_text()[-2000:] for log in (tmp_path / "out").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    (file,) = (tmp_path / "out").glob("tiny-cpu*.json")
    content = json.loads(file.read_text())
    assert (
        content["is_tiny"] and not content["wrong"] and content["rows"] == common.read_rows(file.parent / "gpu.jsonl")
    )
    ended = {row["stage"]: row["exit_code"] for row in content["rows"] if row["name"] == "stage"}
    stages = {name for name, stage in gpu.STAGES.items() if stage.is_in_tiny}
    assert ended == dict.fromkeys(stages, 0) and set(gpu.STAGES) - stages == {"large"}  # bert-base's code
    sound = {row["stage"] for row in content["rows"] if row["ok"] and row["name"] != "stage"}
    assert sound == stages - {"recorded"}  # a CPU records nothing, and the row says so
    assert {row["name"] for row in content["rows"] if row.get("samples_per_second")} == {"ours", "stock Trainer"}
    assert "every task, bert-base, batch 32, against the stock Trainer, its best" in done.stdout
