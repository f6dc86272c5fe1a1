"""Folders of finished runs, made without training anything, and readers of the pages over them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from bert_glue.report.words import WORDS
from bert_glue.tasks import get_task

EVIL = '<img src=x onerror="alert(1)">'


def split(task: str, value: float, **changes) -> dict:
    labels = list(get_task(task).labels)
    row = {"row": 3, "label": labels[0], "prediction": labels[1]}
    shares = [
        {"precision": 30 / 45, "recall": 0.75, "f1": 60 / 85},
        {"precision": 16 / 26, "recall": 16 / 31, "f1": 0.5614},
    ]
    return {
        "suffix": "", "rows": 71, "value": value, "majority": 40 / 71, "standard_error": 0.059, "labels": labels,
        "classes": [{"label": labels[at], "rows": n, **shares[at]} for at, n in enumerate((40, 31))],
        "confused": [{"label": labels[1], "prediction": labels[0], "rows": 15}],
        "confusion": [[30, 10], [15, 16]],
        "calibration": {"ece": 0.123, "bins": [[0.5, 0.6, 41, 0.55, 0.5], [0.9, 1.0, 30, 0.97, 0.8]]},
        "hardest": [{**row, "texts": [EVIL, "b & c"], "probability": 0.9, "loss": 2.3}],
        "explained": [{**row, "tokens": ["[CLS]", EVIL, "."], "scores": [0.1, -0.5, 0.2]}],
        **changes,
    }  # fmt: skip


def many_classes(count: int) -> dict:
    labels = [f"a class with a name of some length, number {at}" for at in range(count)]
    shares = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3}
    found = {
        "classes": [{"label": label, "rows": 10, **shares} for label in labels],
        "confused": [{"label": labels[at], "prediction": labels[at + 1], "rows": 9 - at} for at in range(5)],
    }
    if count <= 50:
        found |= {"labels": labels, "confusion": [[int(a == b) for a in range(count)] for b in range(count)]}
    return found


def make_run(folder: Path, task: str = "wnli", value: float | None = 0.5775, steps: int = 40, **changes) -> Path:
    """The folder of a finished run, without training anything."""
    folder.mkdir(parents=True)
    row = get_task(task)
    results = {
        "task_name": task, "headline_metric": row.headline, "model_name_or_path": f"bert-{EVIL}", "data": EVIL,
        "sample_data": False, "device": "x", "device_name": "Some Device", "world_size": 1, "precision": "O2 bf16",
        "fallback": "", "batches": "packed", "seed": 42, "epoch": 1.0, "train_steps": steps, "train_loss": 0.7,
        "train_runtime": 75.2, "e2e_runtime": 90.0, "train_samples_per_second": 321.5, "eval_samples": 71,
        "eval_samples_per_second": 999.0, f"eval_{row.headline}": value, "eval_majority_baseline": 40 / 71,
        f"eval_{row.headline}_standard_error": 0.059, "learning_rate": 2e-5, "seconds": {"data": 1.5}, **changes,
    }  # fmt: skip
    history = [{"step": n, "loss": 1 / n, "learning_rate": 2e-5 / n, "loss_scale": 1024.0} for n in range(1, steps + 1)]
    history += [{"step": n, "eval_loss": 0.7, f"eval_{row.headline}": 0.5} for n in range(20, steps + 1, 20)]
    (folder / "all_results.json").write_text(json.dumps(results))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    analysis = {"splits": {"validation": split(task, value)}} if row.num_labels == 2 else {}
    (folder / "analysis.json").write_text(json.dumps(analysis))
    origin = {"started": "2026-11-26T09:12:44+00:00", "packages": {"torch": "2.13.0"}, "arguments": {}}
    (folder / "run.json").write_text(json.dumps(origin))
    return folder


def suite(folder: Path) -> Path:
    for seed, value in enumerate((0.60, 0.70, 40 / 71)):
        changes = {"eval_collapsed": "all 71 predictions are not_entailment"} if seed == 2 else {}
        make_run(folder / f"wnli-{seed}", value=value, seed=seed, model_name_or_path="x/bert", **changes)
    make_run(folder / "deep" / "cola-1", "cola", value=None, seed=1, model_name_or_path="x/bert")
    (folder / "cola-2").mkdir()
    (folder / "cola-2" / ".lock").write_text("")
    return folder


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong order."""

    VOID = {"meta", "input", "br"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def checked(text: str) -> str:
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return text


def english_words(key: str) -> str:
    return WORDS[key][0]


def english(page: str) -> str:
    return re.sub(r"<[^>]+>", "", re.sub(r'<span class="zh".*?</span>', "", page))


def rows_of(page: str) -> list[list[str]]:
    """Cells of all tables, in English, without tags."""
    page = re.sub(r'<span class="zh".*?</span>', "", page)
    return [
        [
            " ".join(re.sub(r"<[^>]+>", " ", cell).split())
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line, re.S)
        ]
        for line in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.S)
    ]
