"""Code that several benchmarks share: random models and tokens, child processes, and files of measured rows.

A file of rows has one JSON object per line. An interrupted measurement continues with the missing rows.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bert_glue.result_keys import evaluation_key, without_eval  # noqa: E402
from bert_glue.storage.files import read_results  # noqa: E402
from bert_glue.tasks import TASKS  # noqa: E402

# Devlin et al. 2019, section 3; transformers' BertConfig is bert-base.
_LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
MODEL_SHAPES = {"bert-base": {}, "bert-large": _LARGE}
# MiniLM's size (Wang et al. 2020, arXiv 2002.10957) in the shape of other families; a gated feed-forward has 2/3 of the
# width, so that its three products cost what two do.
_MINILM = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_DEBERTA_V3 = {
    "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "type_vocab_size": 0,
}  # fmt: skip
_ORDINARY_IDS = {"bos_token_id": 101, "cls_token_id": 101, "eos_token_id": 102, "sep_token_id": 102, "pad_token_id": 0}
FAMILY_SHAPES = {
    "bert": _MINILM,
    "modernbert": {**_MINILM, "intermediate_size": 1024, **_ORDINARY_IDS},
    "mpnet": _MINILM,
    "deberta-v2": {**_MINILM, **_DEBERTA_V3},
    "ernie": _MINILM,
    "roberta-prelayernorm": _MINILM,
}


def write_model(folder: Path, shape: str, vocab: Path | None = None) -> str:
    """A model folder of a published shape with random weights; without a vocabulary file, one of 7,995 numbers."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    if vocab is None:
        vocab = folder / "numbers"
        vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(7995))]) + "\n")
    words = len(vocab.read_text(encoding="utf-8").splitlines())
    # Without a head: tasks have one, two or three labels.
    BertModel(BertConfig(vocab_size=words, **MODEL_SHAPES[shape])).save_pretrained(folder)
    shutil.copy(vocab, folder / "vocab.txt")
    settings = {"do_lower_case": "uncased" in vocab.name, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


def write_family(folder: Path, model_type: str, vocab: Path) -> str:
    """A model folder of a family in MiniLM's size with random weights and the WordPiece vocabulary `vocab`."""
    import torch
    from transformers import AutoConfig, AutoModel, BertTokenizerFast

    torch.manual_seed(0)
    words = len(vocab.read_text(encoding="utf-8").splitlines())
    config = AutoConfig.for_model(model_type, vocab_size=words, **FAMILY_SHAPES[model_type])
    AutoModel.from_config(config).save_pretrained(folder)
    BertTokenizerFast(str(vocab), do_lower_case="uncased" in vocab.name).save_pretrained(folder)
    return str(folder)


def random_split(rows: int, low: int, high: int, words: int = 8000):
    """A `TokenSplit` of `rows` pairs of random words below `words`, of `low` to `high` tokens, with labels 0 and 1."""
    import numpy as np

    from bert_glue.data.batching import TokenSplit
    from bert_glue.data.tokenization import TokenTable

    draw = np.random.default_rng(0)
    lengths = draw.integers(low, high + 1, rows)
    ids = draw.integers(5, words, lengths.sum()).astype(np.int32)
    types = np.concatenate([np.arange(length) >= length // 2 for length in lengths]).astype(np.int8)
    return TokenSplit("train", TokenTable(ids, np.concatenate([[0], np.cumsum(lengths)]), types), np.arange(rows) % 2)


def free_memory() -> None:
    """Return the memory of deleted models to the device."""
    import torch

    gc.collect()
    getattr(torch.get_device_module(), "empty_cache", lambda: None)()  # a CPU has no such cache


def finish(asked: list[str], threads: int) -> None:
    """Runs a command to its end, offline.

    Raises:
        SystemExit: it failed; its words are shown.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(asked)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def resident_by_step(asked: list[str], threads: int, window: int) -> dict[int, list[int]]:
    """Runs run_glue.py to its end; its resident memory 20 times a second, bytes, by the first step of each window.

    Args:
        asked: the command; its --logging_steps must be smaller than `window`: the lines of its log tell the step.
        window: optimizer steps.

    Raises:
        SystemExit: it failed; its words are shown.
    """
    found: dict[int, list[int]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.NamedTemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as words:
        run = subprocess.Popen(asked, cwd=ROOT, env=environment, stdout=log, stderr=words, text=True)
        # Opened again: through the same descriptor, reading would move the place where the run writes.
        with open(log.name, encoding="utf-8") as lines:
            step = None
            while run.poll() is None:
                told = re.findall(r"^step=(\d+)", lines.read(), re.M)
                step = int(told[-1]) if told else step
                resident = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                if step is not None and resident:  # 0 once the process has ended
                    found.setdefault(step // window * window, []).append(resident)
                time.sleep(0.05)
        if run.returncode:
            words.seek(0)
            raise SystemExit(f"{' '.join(asked)} ended with {run.returncode}:\n{words.read()[-2000:]}")
    return found


def scores(task: str, run: str, out: Path) -> dict[str, float | None]:
    """Validation scores of a finished run by our names, such as f1 or accuracy_mm."""
    row, found = TASKS[task], {}
    theirs = json.loads((out / "hf.json").read_text(encoding="utf-8"))["evaluation"] if run == "hf" else {}
    ours = {} if run == "hf" else read_results(out)
    for split in row.evaluation:
        for metric in row.metrics:
            key = evaluation_key(metric, split.key_suffix)
            found[without_eval(key)] = theirs[split.name]["metrics"][metric] if run == "hf" else ours[key]
    return found


def read_rows(file: Path) -> list[dict]:
    """Lines measured so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def append(file: Path, row: dict) -> None:
    """One more line, in the file and on the screen."""
    with file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


class StageRows:
    """The rows of one stage of a measurement, each in a file as soon as it is known.

    Args:
        file: rows of all stages.
        seconds: after which this stage shall begin nothing more.
        is_tiny: the flow alone matters, with shapes for seconds on a CPU.
    """

    def __init__(self, file: Path, stage: str, seconds: float = math.inf, is_tiny: bool = False):
        self.file, self.stage, self.is_tiny = file, stage, is_tiny
        self._began, self._seconds = time.monotonic(), seconds

    @contextmanager
    def row(self, name: str, **known: object) -> Iterator[dict]:
        """A row: `known` and what the block puts into the dict. A failure is a row as well, and the stage goes on.

        `ok` tells whether the row is sound; the block may set it, and True is its default.
        """
        found: dict = {}
        try:
            yield found
        except Exception as error:  # one broken kernel must not cost the rows after it
            where = traceback.extract_tb(error.__traceback__)[-1]
            found |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:600]}"}
            found |= {"where": f"{Path(where.filename).name}:{where.lineno}"}
            traceback.print_exc()  # in the stage's log
        self._append({"name": name, **known, "ok": True, **found})

    def skip(self, name: str, reason: str, **known: object) -> None:
        """A row that is not measured, with the reason."""
        self._append({"name": name, **known, "ok": None, "reason": reason})

    def has_time(self, seconds: float, name: str, **known: object) -> bool:
        """True if the stage has `seconds` left; else the row says that there was no time for it."""
        if self._seconds - (time.monotonic() - self._began) >= seconds:
            return True
        self.skip(name, "no time was left", **known)
        return False

    def _append(self, row: dict) -> None:
        append(self.file, {"stage": self.stage, "at_seconds": round(time.monotonic() - self._began, 1), **row})


def measure_missing(
    file: Path, seeds: int, tasks: Iterable[str], runs: Iterable[str], measure: Callable[[str, str, int], dict]
) -> None:
    """One line more in `file` for each (task, run, seed) that it does not have yet."""
    have = {(row["task"], row["run"], row["seed"]) for row in read_rows(file)}
    for seed, task, run in itertools.product(range(1, seeds + 1), tasks, runs):
        if (task, run, seed) not in have:
            append(file, measure(task, run, seed))


def by_seed(rows: list[dict], task: str, run: str, metric: str) -> dict[int, float]:
    """Seed -> score of one run; 0 where the metric has no value."""
    return {r["seed"]: r["scores"][metric] or 0.0 for r in rows if (r["task"], r["run"]) == (task, run)}


def cell(values: list[float]) -> str:
    """Mean and deviation x100 of scores; a dash where there are none."""
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def difference(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """Mean difference over common seeds with its 95 % interval, in points."""
    from scipy.stats import t

    pairs = [100 * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    if len(pairs) < 2:
        return f"{pairs[0]:+.1f} (one seed)" if pairs else "-"
    half = t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{statistics.mean(pairs):+.1f} ± {half:.1f}"
