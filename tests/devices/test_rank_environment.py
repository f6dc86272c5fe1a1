"""Which rank a process is, by torchrun's, srun's and mpirun's variables; and runs that each of them starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from free_port import free_port
from simulated_runs import environment as with_simulated_npu
from simulated_runs import needs_simulated_npu
from tiny_run import REPOSITORY, arguments, flags_of

from bert_glue.devices.device import resolve_device
from bert_glue.devices.rank_environment import RankEnvironment, first_of_node_list, read_rank_environment
from bert_glue.errors import MachineError, UsageError

_PLACE = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_the_environment_says_which_rank_this_is() -> None:
    assert read_rank_environment(_PLACE) == RankEnvironment(3, 1, 8, "10.0.0.1", 29500)
    assert read_rank_environment({**_PLACE, "LOCAL_RANK": "3"}) == RankEnvironment(3, 3, 8, "10.0.0.1", 29500)
    del (reference := dict(_PLACE))["LOCAL_RANK"]
    assert read_rank_environment(reference) == RankEnvironment(3, 3, 8, "10.0.0.1", 29500)
    for alone in ({}, {"RANK": "5", "LOCAL_RANK": "x"}, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "no"}):
        assert read_rank_environment(alone) == RankEnvironment(0, 0, 1)
        assert read_rank_environment(alone).variables() == {}
    assert read_rank_environment(_PLACE).variables() == _PLACE


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("RANK", "8", "RANK=8 in the environment: it must be a whole number in [0, 8)"),
        ("RANK", None, "RANK=(not set) in the environment: it must be a whole number in [0, 8)"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK=-1 in the environment: it must be a whole number in [0, 8)"),
        ("WORLD_SIZE", "eight", "WORLD_SIZE=eight in the environment: it must be a whole number in [1, inf)"),
        ("MASTER_ADDR", None, "MASTER_ADDR=(not set) in the environment: the address of rank 0's host is needed"),
        ("MASTER_PORT", "70000", "MASTER_PORT=70000 in the environment: it must be a whole number in [1, 65536)"),
    ],
)
def test_a_wrong_place_is_one_line_that_names_it(name: str, value: str | None, says: str) -> None:
    environment = {key: text for key, text in {**_PLACE, name: value}.items() if text is not None}
    with pytest.raises(UsageError) as error:
        read_rank_environment(environment)
    first, *_, last = str(error.value).splitlines()
    assert first == says and last.startswith("without WORLD_SIZE")


# Slurm and MPI

_STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
}  # fmt: skip
_OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "MASTER_PORT": "29500",
}  # fmt: skip


def test_srun_tells_rank_host_and_a_port_of_the_step() -> None:
    place = read_rank_environment(_STEP)
    assert place[:4] == (9, 1, 16, "gpu03") and 1024 < place.port < 32768
    others = [{**_STEP, "SLURM_STEP_ID": "3"}, {**_STEP, "SLURM_JOB_ID": "4712"}]
    assert len({read_rank_environment(step).port for step in (_STEP, *others)}) == 3
    assert read_rank_environment({**_STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port == place.port
    assert read_rank_environment({**_STEP, "SLURM_STEP_NUM_NODES": "1"}).address == "127.0.0.1"
    own = read_rank_environment({**_STEP, "MASTER_ADDR": "ib-gpu03", "MASTER_PORT": "1234"})
    assert (own.address, own.port) == ("ib-gpu03", 1234)


@pytest.mark.parametrize(
    "alone",
    [
        # A batch script, which has the job's number of tasks; a step of one task; a launcher of its own below srun.
        {name: value for name, value in _STEP.items() if "STEP" not in name},
        {**_STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**_STEP, "WORLD_SIZE": "1"},
        {**_OPEN_MPI, "WORLD_SIZE": "1"},
        # srun --mpi=pmi2 without MPI's local rank
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
    ],
)
def test_one_process_of_a_job_runs_alone(alone: dict[str, str]) -> None:
    assert read_rank_environment(alone) == RankEnvironment(0, 0, 1)


def test_mpirun_goes_before_the_srun_that_started_its_helpers() -> None:
    assert read_rank_environment({**_STEP, **_OPEN_MPI}) == RankEnvironment(2, 2, 4, "127.0.0.1", 29500)
    hydra = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
    place = {"MASTER_ADDR": "a", "MASTER_PORT": "5"}
    assert read_rank_environment({**_STEP, **hydra, **place}) == RankEnvironment(1, 0, 2, "a", 5)


@pytest.mark.parametrize(
    ("variables", "first", "last"),
    [
        ({**_STEP, "SLURM_PROCID": "16"}, "SLURM_PROCID=16 in the environment", "srun started this process"),
        ({**_STEP, "SLURM_LOCALID": "x"}, "SLURM_LOCALID=x in the environment", "srun started this process"),
        ({**_STEP, "SLURM_STEP_NODELIST": ""}, "MASTER_ADDR=(not set)", "srun started this process"),
        ({**_STEP, "SLURM_JOB_ID": ""}, "MASTER_PORT=(not set)", "srun started this process"),
        ({**_OPEN_MPI, "MASTER_PORT": ""}, "MASTER_PORT=(not set)", "mpirun started this process"),
        ({**_OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "MASTER_ADDR=(not set)", "mpirun started this process"),
    ],
)
def test_a_step_without_a_meeting_place_is_refused(variables: dict[str, str], first: str, last: str) -> None:
    with pytest.raises(UsageError) as error:
        read_rank_environment(variables)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(first) and lines[-1].startswith(last) and lines[-1].endswith("set WORLD_SIZE=1")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"), ("node7,node9", "node7"), ("node[7-8,12],login", "node7"), ("n[001,004-9]-ib", "n001-ib"),
        ("rack[0-1]n[10-31],x", "rack0n10"), ("10.0.0.1", "10.0.0.1"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_of_node_list(nodes) == first


# One visible device a rank


class OneOrMoreDevices:
    """torch.cuda of a machine."""

    def __init__(self, count: int):
        self.device_count = lambda: count
        self.is_available = lambda: True


@pytest.mark.parametrize(
    ("count", "visible", "local_rank", "index"),
    [(1, "3", 3, 0), (1, "GPU-5f2a", 1, 0), (8, None, 3, 3), (2, "4,5", 1, 1), (1, None, 1, None), (2, "4,5", 2, None)],
)
def test_a_rank_takes_the_one_device_that_it_can_find(
    monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, local_rank: int, index: int | None
) -> None:
    monkeypatch.setattr("bert_glue.devices.device._module", lambda kind: OneOrMoreDevices(count))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if index is None:
        with pytest.raises(MachineError, match=f"cuda device {local_rank} is not here, there are {count}"):
            resolve_device("cuda", local_rank)
    else:
        assert resolve_device("cuda", local_rank).index == index


# run_glue.py below launchers that are not ours


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of four steps, without --output_dir."""
    args = arguments(
        tmp_path_factory.mktemp("parts"), max_steps=4, do_eval=True, per_device_train_batch_size=4, ddp_timeout=60
    )
    found = flags_of(args)
    at = found.index("--output_dir")
    return [str(REPOSITORY / "run_glue.py"), *found[:at], *found[at + 2 :]]


def ended(*commands: list[str], variables: list[dict[str, str]]) -> str:
    """The output of processes that run at once and end well."""
    outside = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "OMPI_", "PMI_")
    base = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
    children = [
        subprocess.Popen(
            command, env={**base, "OMP_NUM_THREADS": "1", **own}, cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for command, own in zip(commands, variables, strict=True)
    ]  # fmt: skip
    try:
        texts = [child.communicate(timeout=240)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * len(children), texts
    return "".join(texts)


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Results of the run of one process with the same global batch."""
    folder = tmp_path_factory.mktemp("alone")
    both = ["--per_device_train_batch_size", "8", "--output_dir", str(folder)]
    ended([sys.executable, *words, *both], variables=[{}])
    return results(folder)


def check_two(found: dict, alone: dict) -> None:
    assert (found["world_size"], alone["world_size"]) == (2, 1)
    assert found["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-4)


def test_torchrun(words: list[str], alone: dict, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended([*launcher, *words, "--output_dir", str(tmp_path)], variables=[{}])
    check_two(results(tmp_path), alone)


@pytest.mark.slow
def test_accelerate_launch(words: list[str], alone: dict, tmp_path: Path) -> None:
    """With --multi_gpu, as accelerate names several processes; each takes the CPU by --use_cpu."""
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes",
        "2", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()),
    ]  # fmt: skip
    # A configuration file of the user who runs this would decide too.
    variables = {"HF_HOME": str(tmp_path / "none")}
    ended([*launcher, *words, "--output_dir", str(tmp_path / "out")], variables=[variables])
    check_two(results(tmp_path / "out"), alone)


def test_srun(words: list[str], alone: dict, tmp_path: Path) -> None:
    """Two tasks of one step, with the variables that srun sets and none of torchrun's."""
    step = {**_STEP, "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    places = [{**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    ended(*[[sys.executable, *words, "--output_dir", str(tmp_path)]] * 2, variables=places)
    check_two(results(tmp_path), alone)


@needs_simulated_npu
def test_one_visible_device_a_rank(words: list[str], alone: dict, tmp_path: Path) -> None:
    """As `srun --gpus-per-task=1` and many harnesses start ranks; on the simulated NPU."""
    words = [*words, "--device", "npu", "--output_dir", str(tmp_path)]
    words.remove("--use_cpu")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [
        with_simulated_npu(
            **place, RANK=str(rank), LOCAL_RANK=str(rank), SIMULATED_NPU_DEVICES="1",
            ASCEND_RT_VISIBLE_DEVICES=str(4 + rank),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    log = ended(*[[sys.executable, *words]] * 2, variables=places)
    assert "device: npu:0 (simulated Ascend910B1), 2 rank(s)" in log
    check_two(results(tmp_path), alone)
