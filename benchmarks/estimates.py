"""What one H100 should need, on paper: a training step, samples per second, and all of GLUE as a queue of runs.

    python benchmarks/estimates.py            the tables of docs/scaling.md, estimated or from measured rates

Until `benchmarks/gpu.py` has run on a GPU these are estimates: arithmetic on the bytes and operations of a step, at
rates that kernels of an H100 usually reach. Once there is a results file, its rates take their place in the queue.
"""

from __future__ import annotations

import heapq
import json
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bert_glue.tasks import TASKS, TRAINABLE  # noqa: E402

MEASURED = ROOT / "benchmarks" / "results"
# Of a row with the cased vocabulary, special tokens included, cut at 128; qqp and mnli are rounded.
MEAN_TOKENS = {
    "cola": 11.5, "sst2": 14.0, "mrpc": 54.7, "stsb": 29.1, "qqp": 30.0, "mnli": 40.0, "qnli": 52.3, "rte": 68.0,
    "wnli": 37.5,
}  # fmt: skip
_BATCH = 32


@dataclass(frozen=True)
class StepEstimate:
    """A recorded step in bf16 O2 with dropout 0.1 on rows of 25 to 85 tokens; parts in milliseconds.

    Args:
        products: at 450 to 650 TFLOP/s, more in larger ones.
        pointwise: norms, GELU, dropout and sums.
        update: gradients zeroed, widened and measured, then AdamW: 50 bytes a parameter.
        fused_rate: samples/s with compiled layers, summed embedding gradients and one kernel for the update.
    """

    shape: str
    batch: int
    tokens: int
    products: float
    pointwise: float
    attention: float
    update: float
    embeddings: float
    fused_rate: int

    @property
    def milliseconds(self) -> float:
        """The whole step."""
        return self.products + self.pointwise + self.attention + self.update + self.embeddings

    @property
    def rate(self) -> float:
        """Samples per second."""
        return 1000 * self.batch / self.milliseconds


STEPS = (
    StepEstimate("bert-base", 32, 1_813, 1.9, 1.4, 0.4, 1.7, 0.45, 8_100),
    StepEstimate("bert-base", 256, 14_400, 11.2, 6.2, 3.0, 1.7, 0.65, 13_600),
    StepEstimate("bert-large", 32, 1_724, 6.8, 2.9, 0.8, 5.6, 0.45, 2_600),
    StepEstimate("bert-large", 256, 14_500, 41.0, 17.0, 8.0, 5.6, 0.65, 4_100),
)
SHAPES = ("bert-base", "bert-large")


def step_table() -> str:
    """Markdown of `STEPS`."""
    parts = ("products", "pointwise", "attention", "update", "embeddings")
    lines = [
        f"| estimated, H100 | tokens | {' | '.join(f'{part}, ms' for part in parts)} | samples/s | all fused |",
        "|---" * (len(parts) + 4) + "|",
    ]
    for step in STEPS:
        cells = [f"{getattr(step, part):g}" for part in parts]
        name = f"{step.shape}, batch {step.batch}"
        lines.append(f"| {name} | {step.tokens:,} | {' | '.join(cells)} | {step.rate:,.0f} | {step.fused_rate:,} |")
    return "\n".join(lines)


# ---- rates ----


@dataclass(frozen=True)
class Rates:
    """Seconds of a training step of one shape, as a line over its tokens.

    Args:
        step_seconds: of a step without tokens: the update, and what does not grow.
        token_seconds: of each token more.
        is_measured: from a results file of gpu.py, not from `STEPS`.
    """

    step_seconds: float
    token_seconds: float
    is_measured: bool = False

    def step(self, tokens: float) -> float:
        """Seconds of a step of so many tokens."""
        return self.step_seconds + tokens * self.token_seconds


def _line(points: list[tuple[float, float]], is_measured: bool) -> Rates:
    """Through two points of (tokens, seconds) of a step."""
    (few, short), (many, long) = sorted(points)
    slope = (long - short) / (many - few)
    return Rates(short - slope * few, slope, is_measured)


def estimated_rates(shape: str) -> Rates:
    """The line through the shape's two rows of `STEPS`."""
    return _line([(step.tokens, step.milliseconds / 1000) for step in STEPS if step.shape == shape], False)


def measured_rates(rows: Iterable[dict], shape: str) -> Rates | None:
    """The line through the shape's recorded runs at batch 32 and 256; None where one of them is missing."""
    points = {}
    for row in rows:
        found = [row.get(name) for name in ("name", "shape", "how", "level", "precision", "lengths", "task", "ok")]
        if found == ["ours", shape, "recorded", "O2", "bf16", [25, 85], None, True]:
            seconds = row["batch"] / row["samples_per_second"]
            points[row["batch"]] = (row["real_tokens_per_second"] * seconds, seconds)
    return _line(list(points.values()), True) if len(points) == 2 else None


def gpu_results() -> dict[str, dict]:
    """Results files of gpu.py by name: those of GPUs that were measured."""
    contents = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(MEASURED.glob("*.json"))}
    return {name: content for name, content in contents.items() if "verdict" in content}


def rates(shape: str) -> Rates:
    """Measured rates if there are some, else the estimate."""
    for content in gpu_results().values():
        found = measured_rates(content["rows"], shape)
        if found is not None:
            return found
    return estimated_rates(shape)


# ---- the queue ----


@dataclass(frozen=True)
class QueuedRun:
    """One run of a sweep: the host prepares it, the device trains and scores it, the host saves it.

    Args:
        before, after: seconds in which the device has nothing to do.
        device: seconds of the device, if it does nothing else.
    """

    name: str
    before: float
    device: float
    after: float


# Estimates of the host's parts, seconds: imports, CUDA's start and the model's weights; the model on disk with its hash
# and its report; rows tokenized in a second by 16 cores, which only the first seed of a task waits for.
_START = {"bert-base": 14.0, "bert-large": 18.0}
_END = {"bert-base": 4.0, "bert-large": 10.0}
_TOKENIZED = 40_000
# A forward pass is a third of a training step.
_EVALUATION = 1 / 3


def glue_run(task: str, shape: str, own: Rates, is_first: bool = True) -> QueuedRun:
    """One task at batch 32 for the published epochs, scored once.

    Args:
        is_first: whether it tokenizes; the other seeds find the tokens in the cache.
    """
    row, tokens = TASKS[task], MEAN_TOKENS[task]
    steps = row.published[1].epochs * (row.rows["train"] // _BATCH)
    scored = sum(row.rows[split.name] for split in row.evaluation)
    device = steps * own.step(_BATCH * tokens) + scored * tokens * own.token_seconds * _EVALUATION
    encoded = (row.rows["train"] + scored) / _TOKENIZED if is_first else 0.0
    return QueuedRun(task, _START[shape] + encoded, device, _END[shape])


def queue_seconds(runs: Iterable[QueuedRun], slots: int) -> float:
    """Seconds until a queue is empty, with `slots` runs side by side on one device.

    Processes share a device in turns, so that n runs in training each have 1/n of it: side by side wins only what the
    host would leave idle. Kernels of two processes overlap only under NVIDIA's MPS, which is not assumed.
    """
    waiting, now = deque(runs), 0.0
    # Work of the device done so far by each run that has been there all the time: n runs advance it by 1/n.
    virtual, training = 0.0, []  # heap of (work at which a run is done, number, run)
    host: list[tuple[float, int, str, QueuedRun]] = []  # heap of (time, number, phase, run)
    number = 0

    def start() -> None:
        nonlocal number
        if waiting:
            run, number = waiting.popleft(), number + 1
            heapq.heappush(host, (now + run.before, number, "before", run))

    for _ in range(slots):
        start()
    while host or training:
        done_training = now + (training[0][0] - virtual) * len(training) if training else float("inf")
        if training and (not host or done_training <= host[0][0]):
            now, virtual = done_training, training[0][0]
            _, key, run = heapq.heappop(training)
            heapq.heappush(host, (now + run.after, key, "after", run))
            continue
        time, key, phase, run = heapq.heappop(host)
        virtual += (time - now) / len(training) if training else 0.0
        now = time
        if phase == "before":
            heapq.heappush(training, (virtual + run.device, key, run))
        else:
            start()
    return now


def glue_queue(shape: str, own: Rates, seeds: int) -> list[QueuedRun]:
    """All nine tasks in the order of a sweep: the largest first, their seeds one after the other."""
    by_size = sorted(TRAINABLE, key=lambda name: -TASKS[name].rows["train"])
    return [glue_run(task, shape, own, seed == 0) for task in by_size for seed in range(seeds)]


# ---- the page ----

TARGET_MINUTES = {"bert-base": 10, "bert-large": 30}
_SIDE_BY_SIDE = (1, 2, 4, 8)


def page() -> str:
    """The tables of docs/scaling.md: what each task needs, and the whole of GLUE."""
    own = {shape: rates(shape) for shape in SHAPES}
    origin = {shape: "measured" if own[shape].is_measured else "estimated" for shape in SHAPES}
    lines = [
        f"| task | samples | tokens a row | {' | '.join(f'{s}, s ({origin[s]})' for s in SHAPES)} |",
        "|---" * (3 + len(SHAPES)) + "|",
    ]
    for task in sorted(TRAINABLE, key=lambda name: -TASKS[name].rows["train"]):
        samples = TASKS[task].published[1].epochs * TASKS[task].rows["train"]
        cells = [f"{glue_run(task, shape, own[shape]).device:,.0f}" for shape in SHAPES]
        lines.append(f"| {task} | {samples:,} | {MEAN_TOKENS[task]:g} | {' | '.join(cells)} |")
    total = sum(TASKS[task].published[1].epochs * TASKS[task].rows["train"] for task in TRAINABLE)
    cells = [f"{sum(run.device for run in glue_queue(shape, own[shape], 1)):,.0f}" for shape in SHAPES]
    lines += [f"| all | {total:,} | | {' | '.join(cells)} |", ""]
    lines += [
        f"| all of GLUE, minutes | seeds | {' | '.join(f'{n} at once' for n in _SIDE_BY_SIDE)} | target |",
        "|---" * (3 + len(_SIDE_BY_SIDE)) + "|",
    ]
    for shape in SHAPES:
        for seeds in (1, 3):
            minutes = [queue_seconds(glue_queue(shape, own[shape], seeds), n) / 60 for n in _SIDE_BY_SIDE]
            shown = " | ".join(f"{value:.1f}" for value in minutes)
            target = _judged(min(minutes), TARGET_MINUTES[shape]) if seeds == 1 else "-"
            lines.append(f"| {shape}, {origin[shape]} | {seeds} | {shown} | {target} |")
    return "\n".join(lines) + "\n"


def _judged(minutes: float, target: float) -> str:
    if minutes <= target:
        return f"at most {target}: reached"
    return f"at most {target}: missed by {minutes - target:.1f}"


if __name__ == "__main__":
    print(page(), end="")
