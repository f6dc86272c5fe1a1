"""The memory of a training on the host: it stays flat for a thousand steps, and what cannot fit is refused before."""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from packed_reference import with_dropout
from tiny_models import random_batch, stock_model
from tiny_run import arguments, fit
from transformers import BertConfig, BertModel

from benchmarks.common import resident_by_step
from bert_glue.devices import host_memory
from bert_glue.errors import MachineError
from bert_glue.model.attention import least_bytes
from bert_glue.model.layers import DropoutMasks

STEPS, WINDOW = 1000, 50
# name -> least and most words of a row: as mrpc's sentences, and as RTE's, with few long rows among short ones
LENGTHS = {"like mrpc": (20, 80), "like rte": (20, 250)}
# What stands for a window of steps. The highest point of rows like RTE's depends on which long ones met in a batch: of
# neighbouring windows it was 690 and 649 MiB.
OF_WINDOW = {"like mrpc": max, "like rte": median}


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
    found = resident_by_step(command, threads, WINDOW)
    sizes = {window: OF_WINDOW[rows](samples) for window, samples in found.items()}
    early, late = sizes[100], max(sizes[STEPS - 2 * WINDOW], sizes[STEPS - WINDOW])
    assert late < 1.03 * early, {window: int(size) >> 20 for window, size in sizes.items()}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("bert", {"num_hidden_layers": 3}),
        ("modernbert", {"num_hidden_layers": 4}),
        ("modernbert", {"classifier_pooling": "mean"}),
        ("mpnet", {}),
        ("deberta-v2", {}),
    ],
    ids=str,
)
def test_the_least_memory_of_attention_is_what_backward_keeps(model_type, changes):
    module, longest, kept = with_dropout(stock_model(model_type, **changes)), 200, 0
    shape = module.shape

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        # One element a head and pair of tokens, or of the width of the block: probabilities, or their mask in bytes.
        if shape.heads * longest**2 <= tensor.numel() < 1.25 * shape.heads * longest**2:
            kept += tensor.nbytes
        return tensor

    packed, _ = random_batch((longest,), pairs=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(**packed, dropout_masks=DropoutMasks(0))
    gradient = shape.heads * longest**2 * 4
    least = least_bytes(shape, longest, 4, is_checkpointed=False) - gradient
    assert 0 < least <= kept < 1.25 * least


def test_rows_that_cannot_fit_are_refused_with_the_ways_out(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    fit(args)
    monkeypatch.setattr(host_memory, "_physical", lambda: (1 << 34, 5_000))
    with pytest.raises(
        MachineError, match=r"the longest training row has \d+ tokens, and its attention takes at least"
    ):
        fit(args)
    monkeypatch.setattr(host_memory, "_physical", lambda: (None, None))
    fit(args)
