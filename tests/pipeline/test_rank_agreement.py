"""Ranks that differ refuse to train, and the error names what differs on which rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import arguments, changed

from bert_glue.errors import RankError, UsageError
from bert_glue.pipeline import rank_agreement
from bert_glue.pipeline.rank_agreement import compare_inputs, compare_settings, differences


class Peers:
    """The first of several ranks; the others return `others`, in the order of collectives."""

    def __init__(self, *others):
        self.others, self.world_size, self.is_closed = list(others), 2, False

    def all_gather_object(self, value):
        return [value, self.others.pop(0)]

    def barrier(self): ...

    def close(self):
        self.is_closed = True


class Recorder(Peers):
    """Gives back what this rank sends."""

    def all_gather_object(self, value):
        self.sent = value
        return [value, value]


def test_differences_are_named_with_their_ranks():
    facts = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 3, "c": None}]
    assert differences(facts) == [
        "ranks differ in b: 2 on rank 0; 3 on ranks 1, 2; start all ranks with the same value",
        "ranks differ in c: missing on ranks 0, 1; None on rank 2; start all ranks with the same value",
    ]
    assert differences([{"a": 1}] * 8) == []


@pytest.mark.parametrize(
    "change", [{"seed": 9}, {"learning_rate": 1e-2}, {"bf16": True}, {"per_device_train_batch_size": 3}]
)
def test_a_flag_that_differs_is_a_usage_error(tmp_path, change):
    args, same = arguments(tmp_path), Recorder()
    compare_settings(same, changed(args, **change))
    peers = Peers(same.sent)
    with pytest.raises(UsageError, match=f"--{next(iter(change))}"):
        compare_settings(peers, args)
    assert peers.is_closed


def test_paths_and_devices_may_differ(tmp_path):
    same = Recorder()
    compare_settings(same, changed(arguments(tmp_path), output_dir="elsewhere", cache_dir="c", device="cpu"))
    compare_settings(Peers(same.sent), arguments(tmp_path))


def test_a_library_that_differs_is_refused(tmp_path, monkeypatch):
    same = Recorder()
    compare_settings(same, arguments(tmp_path))
    monkeypatch.setattr(rank_agreement, "package_versions", lambda: {"torch": "0.1"})
    with pytest.raises(RankError, match="torch"):
        compare_settings(Peers(same.sent), arguments(tmp_path))


def test_rows_order_labels_and_weights_are_compared():
    def inputs(ids=(1, 2, 3), labels=(0, 1), weight=1.0):
        table = SimpleNamespace(ids=np.array(ids, np.int32), offsets=np.array([0, 1, 3]), types=None, first=None)
        module = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(module.weight, weight)
        torch.nn.init.zeros_(module.bias)
        split = SimpleNamespace(table=table, labels=np.array(labels))
        return SimpleNamespace(labels=("a", "b")), {"train": split}, SimpleNamespace(module=module)

    same = Recorder()
    compare_inputs(same, *inputs())
    compare_inputs(Peers(same.sent), *inputs())
    others = ({"ids": (1, 3, 2)}, "data of train"), ({"labels": (1, 0)}, "data of train"), ({"weight": 2.0}, "weights")
    for other, name in others:
        with pytest.raises(RankError, match=name):
            compare_inputs(Peers(same.sent), *inputs(**other))


def test_the_code_of_the_whole_package_is_compared(monkeypatch):
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    rank_agreement._code_hash.__wrapped__()
    package = Path(rank_agreement.__file__).parents[1]
    assert {"errors.py", "training/loop.py", "pipeline/run.py"} <= {str(path.relative_to(package)) for path in read}


def test_values_that_begin_alike_still_differ():
    long = "x" * 80
    (line,) = rank_agreement.differences([{"class names": long + "a"}, {"class names": long + "b"}])
    assert "rank 0" in line and "rank 1" in line and len(line) < 250
