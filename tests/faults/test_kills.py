"""kill -9 at any moment: the resumed run ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from jobs import Job, argv_of, last_state
from tiny_run import arguments, changed, make_model

from bert_glue.storage import checkpoint

SAVES, EVENTS = 8, 14  # of a run; file operations of one save at least
PRECISIONS = {"O0": {}, "O2": {"bf16": True, "fp16_opt_level": "O2"}}


def settings(folder: Path, accumulation: int, precision: str, **changes):
    """A run of 24 steps that saves every third and deletes as it goes; dropout on."""
    model = make_model(folder / "model", dropout=0.1)
    return arguments(
        folder, model_name_or_path=str(model), gradient_accumulation_steps=accumulation, max_steps=24,
        save_strategy="steps", save_steps=3, save_total_limit=2, eval_strategy="steps", eval_steps=6,
        resume_from_checkpoint="auto", **{"per_device_train_batch_size": 4, **PRECISIONS[precision], **changes},
    )  # fmt: skip


def is_inside_a_save(output: Path) -> bool:
    return any(output.glob(".writing-*")) or any(output.glob(".replaced-*")) or any(output.glob("*/removing.json"))


class Trials:
    """Kills and resumes of one kind of run against its undisturbed result."""

    def __init__(self, server, folder: Path, accumulation: int, precision: str, ranks: int = 1, **changes):
        folder.mkdir(parents=True, exist_ok=True)
        self.server, self.folder, self.ranks = server, folder, ranks
        self.args = settings(folder, accumulation, precision, **changes)
        self.began = self.inside = self.resumed = 0
        self.finish("cold")  # fills the token cache
        started = time.perf_counter()
        self.finish("whole")
        self.seconds = time.perf_counter() - started
        self.expected = last_state(folder / "whole")

    def start(self, name: str, **more) -> list[Job]:
        argv = argv_of(changed(self.args, output_dir=str(self.folder / name)))
        if self.ranks == 1:
            return [self.server.start(argv, self.folder, entry="fit", **more)]
        return self.server.start_ranks(argv, self.folder, self.ranks, entry="fit", **more)

    def finish(self, name: str) -> None:
        jobs = self.start(name)
        for job, code in [(job, job.wait()) for job in jobs]:
            assert code == 0, job.text()[-2000:]

    def kill(self, name: str, draw: random.Random, in_save: bool) -> bool:
        """Start a run and kill it; False if it ended before."""
        if in_save:
            delay = draw.choice([0, draw.uniform(0, 3e-3)])
            jobs = self.start(name, die=(draw.randint(1, SAVES), draw.randrange(EVENTS), delay))
            code = jobs[0].wait()  # the rank that writes dies by itself
            rest = jobs[1:]
        else:
            jobs = self.start(name)
            time.sleep(draw.uniform(0, 0.95 * self.seconds))
            first = draw.choice(jobs)
            first.kill(signal.SIGKILL)
            code = first.wait()
            rest = [job for job in jobs if job is not first]
        for job in rest:  # as the launcher does
            job.kill(signal.SIGKILL)
            job.wait()
        return code < 0

    def kill_and_resume(self, name: str, draw: random.Random, in_save: bool) -> None:
        output = self.folder / name
        while not self.kill(name, draw, in_save):
            shutil.rmtree(output)
        self.inside += output.is_dir() and is_inside_a_save(output)
        self.resumed += bool(checkpoint.list_checkpoints(output))
        self.finish(name)
        assert last_state(output) == self.expected
        assert not is_inside_a_save(output)
        assert len(checkpoint.list_checkpoints(output)) <= 3  # two and the best one

    def check(self, trials: int, draw: random.Random, least_inside: float = 0.3) -> str:
        for at in range(trials):
            self.kill_and_resume(f"run-{at}", draw, in_save=at % 2 == 0)
        assert self.inside >= least_inside * trials, "the kills miss the saves"
        return (
            f"{trials} runs of {self.seconds:.2f} s killed, {self.inside} of them with a save begun and not ended, "
            f"{self.resumed} with a checkpoint to go on from; {trials} ended with the same bits"
        )


KINDS = [(accumulation, precision) for accumulation in (1, 3) for precision in PRECISIONS]


@pytest.mark.parametrize(
    ("accumulation", "precision", "trials"),
    [(1, "O0", 3), (3, "O2", 3), *(pytest.param(*kind, 50, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_a_killed_run_goes_on_to_the_same_bits(server, tmp_path, report, accumulation, precision, trials):
    draw = random.Random(f"{accumulation} {precision} {trials}")
    done = Trials(server, tmp_path, accumulation, precision).check(trials, draw)
    report(f"accumulation {accumulation}, {precision}: {done}")


LORA, HEAD = {"lora_rank": 2, "lora_dropout": 0.1}, {"freeze_encoder": True}


@pytest.mark.parametrize(
    ("part", "trials"), [(LORA, 1), *(pytest.param(part, 20, marks=pytest.mark.slow) for part in (LORA, HEAD))]
)
def test_a_killed_run_of_a_part_goes_on_to_the_same_bits(server, tmp_path, report, part, trials):
    """Adapters and the head alone."""
    done = Trials(server, tmp_path, 1, "O2", **part).check(trials, random.Random(f"{part} {trials}"))
    report(f"{part}: {done}")


@pytest.mark.parametrize(
    ("ranks", "trials"),
    [(2, 2), pytest.param(2, 50, marks=pytest.mark.slow), pytest.param(8, 20, marks=pytest.mark.slow)],
)
def test_killed_ranks_go_on_to_the_same_bits(server, tmp_path, report, ranks, trials):
    """One rank is killed, or the one that writes inside a save, then the others, as a launcher does."""
    draw = random.Random(f"{ranks} {trials}")
    runs = Trials(server, tmp_path, 1, "O0", ranks, per_device_train_batch_size=8 // ranks)
    report(f"{ranks} gloo ranks: {runs.check(trials, draw)}")
