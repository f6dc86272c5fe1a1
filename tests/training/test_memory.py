"""The memory of a long training on the host: what a thousand steps hold is what a hundred held."""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from benchmarks.common import resident_by_step

STEPS, WINDOW = 1000, 50
# name -> least and most words of a row: as mrpc's sentences, and as RTE's, with few long rows among short ones
LENGTHS = {"like mrpc": (20, 80), "like rte": (20, 250)}


def _model(folder: Path) -> Path:
    """Wide enough for products and attention to be most of the memory, and quick enough for a thousand steps."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(995))]
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}), encoding="utf-8")
    return folder


def _rows(file: Path, lengths: tuple[int, int]) -> Path:
    draw = random.Random(0)
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["sentence", "label"])
        for number in range(2000):
            # The square makes long rows rare, as they are in data.
            count = lengths[0] + int((lengths[1] - lengths[0]) * draw.random() ** 2)
            writer.writerow([" ".join(f"w{draw.randrange(995)}" for _ in range(count)), number % 2])
    return file


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("precision", [(), ("--bf16", "--fp16_opt_level", "O2")], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_resident_memory_is_flat(tmp_path, rows, precision, threads):
    model, file = _model(tmp_path / "model"), _rows(tmp_path / "train.csv", LENGTHS[rows])
    output_dir = tmp_path / "run"
    command = [
        sys.executable, "run_glue.py", "--model_name_or_path", str(model), "--train_file", str(file), "--do_train",
        "--max_seq_length", "256", "--per_device_train_batch_size", "32", "--max_steps", str(STEPS), "--logging_steps",
        "10", "--save_strategy", "no", "--output_dir", str(output_dir), "--use_cpu", *precision,
    ]  # fmt: skip
    peaks = resident_by_step(command, threads, output_dir, WINDOW)
    early, late = peaks[100], max(peaks[window] for window in (STEPS - 2 * WINDOW, STEPS - WINDOW))
    assert late < 1.03 * early, {window: size >> 20 for window, size in peaks.items()}
