"""One run on 1, 2, 3 and 8 ranks: the same samples and losses, exact evaluation, one collective a step, one end."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from forked_ranks import GLOBAL_BATCH, SIZES, on_ranks
from tiny_run import REPOSITORY, arguments, flags_of, make_data, make_model, results_of, start

from bert_glue.config.arguments import Arguments
from bert_glue.devices.distributed import DistributedContext
from bert_glue.errors import RankError
from bert_glue.precision.flat_buffers import GradientBuffers
from bert_glue.training.loop import StopVote


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_model(folder / "parts/model")
    make_data(folder / "parts/data")
    return folder


@pytest.fixture(scope="module")
def runs(parts: Path) -> dict[int, list[dict]]:
    return {world: on_ranks(world, "same_run", parts / f"run{world}") for world in (1, 2, 8)}


def rows_of_steps(ranks: list[dict]) -> list[list[int]]:
    """Rows of each optimizer step on all ranks; ranks that got none in a step have no entry for it."""
    steps: list[list[int]] = []
    sizes = [8, 8, 8, 5] * 2
    taken = [iter(rank["rows"]) for rank in ranks]
    for size in sizes:
        shares = [size // len(ranks) + (number < size % len(ranks)) for number in range(len(ranks))]
        steps.append(sorted(itertools.chain(*(next(rows) for rows, share in zip(taken, shares, strict=True) if share))))
    assert all(next(rows, None) is None for rows in taken)
    return steps


@pytest.mark.parametrize("world", [2, 8])
def test_the_same_global_batch_is_the_same_run(runs: dict[int, list[dict]], world: int) -> None:
    alone, ranks = runs[1][0], runs[world]
    assert rows_of_steps(ranks) == rows_of_steps(runs[1])
    assert {tuple(rank["losses"]) for rank in ranks} == {tuple(ranks[0]["losses"])}
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert ranks[0]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert ranks[0]["weight"] == pytest.approx(alone["weight"], rel=1e-5)
    assert len({rank["weight"] for rank in ranks}) == 1  # bit for bit the same on all ranks


@pytest.mark.parametrize("world", [1, 2, 8])
def test_all_samples_are_counted_once_over_all_ranks(runs: dict[int, list[dict]], world: int) -> None:
    assert {rank["samples"] for rank in runs[world]} == {2 * 29}
    assert sum(rank["counted"] for rank in runs[world]) == 2 * 29
    assert GLOBAL_BATCH % world == 0


def test_a_step_has_one_collective(runs: dict[int, list[dict]]) -> None:
    """Between one step's sum and the next: that sum, and where a log line is due that of its loss."""
    for world in (2, 8):
        assert {tuple(rank["collectives"]) for rank in runs[world]} == {(1, 1, 1, 2, 1, 1, 1)}
    assert runs[1][0]["collectives"] == [0] * 7


@pytest.mark.slow
@pytest.mark.parametrize("part", ["lora", "frozen"])
def test_adapters_or_the_head_alone_are_the_same_run(parts: Path, part: str) -> None:
    """The adapters' random start is the same on all ranks."""
    pytest.importorskip("peft")
    (alone,), two = (on_ranks(world, part, parts / f"{part}{world}") for world in (1, 2))
    assert two[0]["losses"] == two[1]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert two[0]["weight"] == two[1]["weight"] == pytest.approx(alone["weight"], rel=1e-5)
    assert {tuple(rank["collectives"]) for rank in two} == {(1, 1, 1, 2, 1, 1, 1)}


@pytest.mark.parametrize("world", [2, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_evaluation_has_each_row_once_in_its_place(parts: Path, world: int) -> None:
    ranks = on_ranks(world, "evaluations", parts / f"evaluation{world}")
    for at, size in enumerate(SIZES):
        for rank in ranks:
            assert rank["echoes"][at] == list(range(size)) and rank["lengths"][at], (size, world)
        assert sorted(itertools.chain(*(rank["rows"][at] for rank in ranks))) == list(range(size))


def test_one_rank_that_is_asked_to_stop_stops_all_at_one_step(parts: Path) -> None:
    assert on_ranks(2, "stopped", parts / "stopped") == [{"step": 5, "saved": ["checkpoint-5"]}] * 2


def test_no_thread_of_the_group_outlives_it(parts: Path) -> None:
    """One that freed a tensor while the interpreter ended aborted a finished run: 1 of 8 on a busy machine."""
    assert not [name for names in on_ranks(2, "closed", parts / "closed") for name in names if "gloo" in name]


# The step's sum


class Pretended:
    """Two ranks, where the other one has only ones, and a device that answers later."""

    world_size = 2

    class device:  # noqa: N801
        is_host = False
        torch_device = torch.device("cpu")

        @staticmethod
        def read_later(number: torch.Tensor):
            value = number.item()
            return lambda: value

    def all_reduce(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor += 1.0


def test_where_work_is_queued_the_answer_is_that_of_the_step_before() -> None:
    vote, buffers = StopVote(Pretended()), GradientBuffers([torch.ones(9)])
    assert vote.all_reduce(buffers, False) is False  # of no step yet
    assert buffers.gradients[0].tolist() == [1.0] * 9
    assert buffers.stop_votes.tolist() == [1.0]  # the other rank's
    assert vote.all_reduce(buffers, False) is True


def test_alone_or_without_gradients() -> None:
    ranks = DistributedContext(Arguments(use_cpu=True))
    assert [StopVote(ranks).all_reduce(GradientBuffers([]), asked) for asked in (False, True)] == [False, True]
    pretended, slots = StopVote(Pretended()), GradientBuffers([])
    pretended.all_reduce(slots, False)
    assert pretended.all_reduce(slots, False) is True


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32, torch.float16)])
@pytest.mark.parametrize("is_joint", [True, False])
def test_slots_ride_with_the_gradients_and_touch_none(dtypes, is_joint: bool) -> None:
    sizes = (65, 1, 200)[: len(dtypes)]
    likes = [torch.ones(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
    buffers = GradientBuffers(likes, is_joint)
    assert buffers.dtypes == (list(dict.fromkeys(dtypes)) if is_joint else [*dtypes, torch.float32])
    for number, (zeros, like) in enumerate(zip(buffers.gradients, likes, strict=True), 1):
        assert zeros.shape == like.shape and zeros.dtype == like.dtype and not zeros.any()
        assert zeros.data_ptr() % 64 == 0
        zeros.fill_(number)
    buffers.overflow.fill_(7.0)
    buffers.stop_votes.fill_(8.0)
    assert all((zeros == number).all() for number, zeros in enumerate(buffers.gradients, 1))
    buffers.all_reduce(Pretended())
    assert [zeros[-1].item() for zeros in buffers.gradients] == [number + 1 for number in range(1, len(likes) + 1)]
    assert (buffers.overflow.item(), buffers.stop_votes.item()) == (8.0, 9.0)
    buffers.zero()
    assert not any(tensor.any() for tensor in (*buffers.gradients, buffers.overflow, buffers.stop_votes))
    if not is_joint:  # an optimizer may move each gradient's memory
        sizes = [zeros.untyped_storage().nbytes() for zeros in buffers.gradients]
        assert sizes == [zeros.numel() * zeros.element_size() for zeros in buffers.gradients]


# How ranks lose each other


def test_ranks_that_do_not_meet_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(PartialState, "_shared_state", {})  # trackers of an earlier test may have made one
    # The timer would end this process, pytest's worker, where a busy machine takes a second longer to raise.
    monkeypatch.setattr("bert_glue.devices.distributed._GRACE_SECONDS", 60)
    with pytest.raises(
        RankError, match=r"rank 1 of 2 lost the other ranks while meeting them, after .* s\): "
    ) as caught:
        DistributedContext(Arguments(use_cpu=True, ddp_timeout=1))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 7
    monkeypatch.setenv("LOCAL_RANK", "0")  # monkeypatch takes it away again


def test_a_port_that_never_answers_ends_in_its_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody answers
        place = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
        words = (
            "from bert_glue.config.arguments import Arguments\n"
            "from bert_glue.devices.distributed import DistributedContext\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", words + "DistributedContext(Arguments(use_cpu=True, ddp_timeout=2))"],
            env={**os.environ, **place, "MASTER_PORT": str(silent.getsockname()[1])},
            cwd=REPOSITORY, timeout=60, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 7
    assert "did not meet the other ranks within --ddp_timeout 2 s" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_the_references_own_way_in(tmp_path: Path, killed: bool) -> None:
    """Processes started by hand, RANK but no LOCAL_RANK in the environment, `--local_rank=i` and one `--device 0`."""
    from free_port import free_port

    args = arguments(tmp_path, max_steps=10**6 if killed else 4, do_eval=True, ddp_timeout=20, logging_steps=2)
    port = str(free_port())
    children = [
        start(
            args, f"--local_rank={rank}", "--device", "0", RANK=str(rank), WORLD_SIZE="8", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(8)
    ]  # fmt: skip
    try:
        if killed:
            next(line for line in children[0].stdout if line.startswith("step="))
            children[5].kill()
        texts = [child.communicate(timeout=200) for child in children]
    finally:
        for child in children:
            child.kill()
    codes = [child.returncode for child in children]
    if not killed:
        assert codes == [0] * 8, texts
        assert results_of(args)["world_size"] == 8
        assert results_of(args)["train_samples_consumed"] == 4 * 29
        return
    assert codes == [7] * 5 + [-9] + [7] * 2, texts
    for rank, (_, errors) in enumerate(texts):
        assert rank == 5 or f"error: rank {rank} of 8 lost the other ranks" in errors


@pytest.mark.slow
def test_a_launch_of_ours_saves_on_a_signal_and_goes_on(tmp_path: Path) -> None:
    """Two real ranks below the launcher: SIGTERM saves a checkpoint (143); the next launch resumes."""
    args = arguments(tmp_path, num_train_epochs=1e5, max_seq_length=32)
    env = {**os.environ, "BERT_GLUE_PYTHON": os.sys.executable, "OMP_NUM_THREADS": "1"}
    words = flags_of(args)
    for name in ("--output_dir", "--num_train_epochs"):
        at = words.index(name)
        del words[at : at + 2]
    base = ["bash", str(REPOSITORY / "test/train_full_8p.sh"), "--TASK=mrpc", "--nproc=2", "--device=cpu"]
    base += [f"--output_dir={args.output_dir}", f"--model={args.model_name_or_path}"]
    data = tmp_path / "glue data"
    for split in ("train", "validation"):
        (data / split).mkdir(parents=True)
        rows = [{"sentence1": f"a dog {n}", "sentence2": f"a cat {n}", "label": n % 2} for n in range(40)]
        (data / split / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base += [f"--data_path={data}", "--batch_size=8"]
    child = subprocess.Popen(
        [*base, "--train_epochs=100000", "--", "--logging_steps", "5"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    next(line for line in child.stdout if line.startswith("step=20 "))
    child.terminate()
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 143, errors
    (saved,) = Path(args.output_dir).glob("checkpoint-*")
    step = int(saved.name.rpartition("-")[2])
    again = subprocess.run(
        [*base, "--", "--max_steps", str(step + 5), "--resume_from_checkpoint", "auto"],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert f"resumed after step {step} from" in again.stdout and "Final Train Accuracy" in again.stdout
