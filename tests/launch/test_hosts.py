"""Ranks on two hosts: they meet at real addresses; if one is lost, the other ends in time, and a new launch resumes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_stubs import REPOSITORY, clean_environment, copy_repository, wait_for, write_script
from two_hosts import ADDRESSES, CABLE, KernelForbids, TwoHosts

TIMEOUT = 8  # seconds that ranks wait for each other in these tests


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        with TwoHosts() as both:
            yield both
    except KernelForbids as error:
        pytest.skip(f"no network namespaces here: {error}")


def start(hosts: TwoHosts, host: int, launcher: Path, output: Path, *flags: str, **settings: str) -> subprocess.Popen:
    """The launcher on one host."""
    command = [
        "bash", str(launcher), "--TASK=mrpc", "--sample", "--device=cpu", "--nproc=1", "--nnodes=2",
        f"--node_rank={host}", f"--master_addr={ADDRESSES[0]}", f"--output_dir={output}",
    ]  # fmt: skip
    return subprocess.Popen(
        hosts.command(host, *command, *flags),
        env=clean_environment(BERT_GLUE_CACHE=os.environ["BERT_GLUE_CACHE"], OMP_NUM_THREADS="1", **settings),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def ended(children: list[subprocess.Popen], seconds: float) -> tuple[list[str], list[str]]:
    """Output and errors of launchers that have to end in time."""
    until = time.monotonic() + seconds
    try:
        texts = [child.communicate(timeout=max(1.0, until - time.monotonic())) for child in children]
    finally:
        for child in children:
            child.kill()
    return [out for out, _ in texts], [err for _, err in texts]


def test_launchers_of_two_hosts_meet(hosts: TwoHosts, tmp_path: Path) -> None:
    repo, output = copy_repository(tmp_path), tmp_path / "shared"
    launcher = repo / "test/train_multinode.sh"
    children = [start(hosts, host, launcher, output, STUB_MEET="1") for host in (0, 1)]
    outputs, errors = ended(children, 60)
    assert [child.returncode for child in children] == [0, 0], errors
    for rank in (0, 1):
        call = json.loads((output / f"called.json.{rank}").read_text())
        env = call["env"]
        assert (env["WORLD_SIZE"], env["LOCAL_RANK"], env["MASTER_ADDR"]) == ("2", "0", ADDRESSES[0])
        assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == CABLE
        assert env["HCCL_IF_IP"] == ADDRESSES[rank]
        assert (output / f"met.{rank}").read_text() == str(output)
        assert (output / f"train_rank_{rank}.log").is_file()
        assert call["argv"][call["argv"].index("--resume_from_checkpoint") + 1] == "auto"
    assert "Final Performance" in outputs[0] and "Final Performance" not in outputs[1]


def test_a_first_host_that_is_not_there(hosts: TwoHosts, tmp_path: Path) -> None:
    child = start(
        hosts, 1, copy_repository(tmp_path) / "test/train_multinode.sh", tmp_path / "o", "--", "--ddp_timeout=4"
    )
    _, (errors,) = ended([child], 40)
    assert child.returncode == 4
    assert "error: no rank was started" in errors and ADDRESSES[0] in errors


def step_of(output: Path) -> int:
    """Of the newest checkpoint that is whole."""
    steps = [int(folder.name.rpartition("-")[2]) for folder in output.glob("checkpoint-*")]
    return max(steps, default=0)


def training(hosts: TwoHosts, output: Path, steps: int) -> list[subprocess.Popen]:
    launcher = REPOSITORY / "test/train_multinode.sh"
    flags = ("--", "--max_steps", str(steps), "--ddp_timeout", str(TIMEOUT), "--logging_steps", "46")
    return [start(hosts, host, launcher, output, *flags) for host in (0, 1)]


def until_checkpoint(output: Path, children: list[subprocess.Popen], seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while not step_of(output):
        assert time.monotonic() < until and all(child.poll() is None for child in children), ended(children, 1)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cable cut", "host killed"])
def test_a_lost_host_ends_the_other_and_a_new_launch_goes_on(hosts: TwoHosts, tmp_path: Path, how: str) -> None:
    output = tmp_path / "shared"
    children = training(hosts, output, 1_000_000)
    until_checkpoint(output, children)
    began = time.monotonic()
    if how == "cable cut":
        hosts.cut()
        outputs, errors = ended(children, TIMEOUT + 30)
        assert [child.returncode for child in children] == [7, 7], errors
    else:
        os.killpg(children[1].pid, signal.SIGKILL)
        outputs, errors = ended(children[:1], TIMEOUT + 30)
        assert children[0].returncode == 7, errors
        children[1].communicate()
    assert time.monotonic() - began < TIMEOUT + 20
    assert re.search(r"rank 0 of 2 lost the other ranks while .*--ddp_timeout 8 s", errors[0])
    assert "Traceback" not in errors[0] and "Final" not in outputs[0]
    hosts.mend()
    step = step_of(output)
    again = training(hosts, output, step + 46)
    outputs, errors = ended(again, 240)
    assert [child.returncode for child in again] == [0, 0], errors
    assert f"resumed after step {step} from" in outputs[0] and "Final Train Accuracy" in outputs[0]
    assert json.loads((output / "all_results.json").read_text())["train_steps"] == step + 46


# Recipes of schedulers: their command lines, with the scheduler's own tools replaced


def test_slurm_recipe(tmp_path: Path) -> None:
    repo = copy_repository(tmp_path)
    shutil.copytree(REPOSITORY / "deploy/slurm", repo / "deploy/slurm", dirs_exist_ok=True)
    tools = tmp_path / "tools"
    # Two tasks, of which we let the first host be this one; it would wait for the second one's launcher.
    write_script(tools / "srun", '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"\n')
    write_script(
        tools / "scontrol",
        '#!/bin/bash\n[[ $* == "show hostnames node[7-8]" ]] && echo "127.0.0.1 node8" | tr " " "\\n"\n',
    )
    done = subprocess.run(
        ["bash", str(repo / "deploy/slurm/train.sbatch"), "--TASK=rte", "--nproc=1", f"--output_dir={tmp_path}/out"],
        env=clean_environment(
            PATH=f"{tools}:{os.environ['PATH']}", SLURM_NNODES="1", SLURM_JOB_ID="31", SLURM_JOB_NODELIST="node[7-8]",
            SLURM_SUBMIT_DIR=str(repo),
        ),
        cwd=repo, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    call = json.loads((tmp_path / "out/called.json.0").read_text())
    assert call["argv"][call["argv"].index("--task_name") + 1] == "rte"


def test_kubernetes_recipe(tmp_path: Path) -> None:
    import yaml

    repo = copy_repository(tmp_path)
    job = yaml.safe_load((REPOSITORY / "deploy/kubernetes/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["replicas"] for name, spec in replicas.items()} == {"Master": 1, "Worker": 1}
    volumes = []
    for spec in replicas.values():
        assert spec["restartPolicy"] == "OnFailure"
        (container,) = spec["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator looks for this name
        volumes.append(container["volumeMounts"])
        command = [*container["command"], *container["args"]]
        done = subprocess.run(
            [word.replace("/results", str(tmp_path / "results")) for word in command],
            # As the operator sets them, here for a job of one pod.
            env=clean_environment(WORLD_SIZE="1", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="23456", NPROC="1"),
            cwd=repo, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert volumes[0] == volumes[1]
    wait_for(tmp_path / "results/mrpc/called.json.0")
