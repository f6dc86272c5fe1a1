"""How launchers find or make a python, and the environment of an NPU."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from launch_stubs import (
    FAKE_PYTHON,
    FAKE_VENV_PYTHON,
    REPOSITORY,
    called,
    clean_environment,
    copy_repository,
    launch,
    wait_for,
    write_script,
)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return copy_repository(tmp_path)


# Setting up a python


@pytest.fixture
def bare(repo: Path) -> Path:
    """Folder with a python3 that lacks the requirements and makes virtual environments with a stub pip."""
    folder = repo.parent / "bin"
    for name in ("python3", "python"):
        write_script(folder / name, FAKE_PYTHON)
    write_script(folder / "venv_python", FAKE_VENV_PYTHON)
    return folder


def bare_settings(repo: Path, bare: Path, **settings: str) -> dict[str, str]:
    calls = str(repo.parent / "pip_calls")
    return {"BERT_GLUE_PYTHON": "", "PATH": f"{bare}:/usr/bin:/bin", "PIP_CALLS": calls, **settings}


def pip_calls(repo: Path) -> list[str]:
    return (repo.parent / "pip_calls").read_text().splitlines()


def test_missing_requirements_are_installed_once(repo: Path, bare: Path) -> None:
    settings = bare_settings(repo, bare)
    first = launch(repo, "--TASK=mrpc", "--sample", **settings)
    assert first.returncode == 0, first.stderr
    assert first.stderr.startswith("setup: python3 lacks torch, datasets; installing into .venv")
    second = launch(repo, "--TASK=mrpc", "--sample", **settings)
    assert "setup" not in second.stderr
    assert len(pip_calls(repo)) == 1
    assert first.stdout == second.stdout


def test_two_launches_at_once_install_once(repo: Path, bare: Path) -> None:
    environment = clean_environment(**bare_settings(repo, bare, FAKE_PIP_SLEEP="2"))
    children = [
        subprocess.Popen(
            ["bash", str(repo / "test/train_full_1p.sh"), "--TASK=mrpc", f"--output_dir={repo}/out{number}"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    notes = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], notes
    assert len(pip_calls(repo)) == 1
    assert "waiting for another launch" in "".join(notes)


def test_after_an_interrupted_installation_the_environment_is_made_anew(repo: Path, bare: Path) -> None:
    settings = bare_settings(repo, bare, FAKE_PIP_SLEEP="30")
    child = subprocess.Popen(
        ["bash", str(repo / "test/train_full_1p.sh"), "--TASK=mrpc"],
        env=clean_environment(**settings),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(repo.parent / "pip_calls")
    os.killpg(child.pid, signal.SIGKILL)
    child.wait(timeout=10)
    half = repo / ".venv/lib/python3.11/site-packages/torch"
    half.mkdir(parents=True)
    (repo / ".venv/installed").touch()  # the metadata may look complete
    done = launch(repo, "--TASK=mrpc", **bare_settings(repo, bare))
    assert done.returncode == 0, done.stderr
    assert "an earlier installation was interrupted" in done.stderr
    assert len(pip_calls(repo)) == 2
    assert not half.exists()  # made anew: pip takes half a package for a whole one


def test_a_failing_pip_shows_its_last_lines(repo: Path, bare: Path) -> None:
    done = launch(repo, "--TASK=mrpc", **bare_settings(repo, bare, FAKE_PIP_FAILS="1"))
    assert done.returncode == 4
    assert "No matching distribution for torch" in done.stderr
    assert launch(repo, "--TASK=mrpc", **bare_settings(repo, bare)).returncode == 0


def test_an_environment_that_has_the_requirements_is_used_as_it_is(repo: Path, bare: Path) -> None:
    done = launch(repo, "--TASK=mrpc", **bare_settings(repo, bare, FAKE_LACKS="0"))
    assert done.returncode == 0, done.stderr
    assert not (repo / ".venv").exists()


def test_an_environment_with_torch_stays_as_it_is(repo: Path, bare: Path) -> None:
    settings = bare_settings(repo, bare, FAKE_LACKS="3")
    done = launch(repo, "--TASK=mrpc", **settings)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("setup: python3 lacks torch, datasets; installing into .venv-system")
    assert not (repo / ".venv").exists()
    assert "-m venv --clear --without-pip --system-site-packages" in (repo.parent / "venv_calls").read_text()
    assert (repo / ".venv-system/specs.txt").read_text().split() == ["datasets>=3.0", "torch==2.7.1"]
    assert "setup" not in launch(repo, "--TASK=mrpc", **settings).stderr
    assert len(pip_calls(repo)) == 1 and pip_calls(repo)[0].endswith("specs.txt")


def test_a_virtual_environment_with_torch_is_told_what_to_install(repo: Path, bare: Path) -> None:
    done = launch(repo, "--TASK=mrpc", **bare_settings(repo, bare, FAKE_LACKS="3", FAKE_VIRTUAL="1"))
    assert done.returncode == 4
    assert "this virtual environment has torch but lacks torch, datasets; install it with: pip install X" in done.stderr
    assert not (repo / ".venv-system").exists()


def test_a_chosen_python_is_used_or_refused(repo: Path, bare: Path) -> None:
    done = launch(repo, "--TASK=mrpc", BERT_GLUE_PYTHON=str(bare / "python3"))
    assert done.returncode == 4
    assert "BERT_GLUE_PYTHON lacks torch, datasets; install it with: pip install X" in done.stderr


def test_libgomp_is_preloaded_on_aarch64(repo: Path) -> None:
    tools = repo.parent / "tools"
    site = repo.parent / "site"
    libraries = [site / "scikit_learn.libs/libgomp-1.so.1", site / "torch/lib/libgomp-2.so.1"]
    for library in libraries:
        library.parent.mkdir(parents=True)
        library.touch()
    write_script(tools / "uname", "#!/bin/bash\necho aarch64\n")
    write_script(tools / "python", f'#!/bin/bash\n[[ $* == *sysconfig* ]] && echo "{site}" && exit\nexec REAL "$@"\n')
    settings = {"BERT_GLUE_PYTHON": str(tools / "python"), "PATH": f"{tools}:{os.environ['PATH']}"}
    assert launch(repo, "--TASK=mrpc", **settings).returncode == 0
    assert sorted(called(repo)["env"]["LD_PRELOAD"].split(":")) == sorted(map(str, libraries))
    launch(repo, "--TASK=mrpc")
    if os.uname().machine != "aarch64":
        assert "LD_PRELOAD" not in called(repo)["env"]


# NPU environment


def npu_environment(home: Path, timeout: str = "", **settings: str) -> dict[str, str]:
    """Variables after `npu_environment`, for a user whose home is `home`."""
    script = f'set -euo pipefail; source "{REPOSITORY}/test/env_npu.sh"; npu_environment {timeout}; env -0'
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.environ["PATH"], "HOME": str(home), **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(pair.split("=", 1) for pair in done.stdout.rstrip("\0").split("\0"))


@pytest.fixture
def home_with_cann(tmp_path: Path) -> Path:
    script = 'export ASCEND_HOME_PATH=here PYTHONPATH="$NOT_SET:x"\nfalse\n'  # as careless as the real one
    write_script(tmp_path / "Ascend/ascend-toolkit/set_env.sh", script)
    return tmp_path


def test_cann_of_the_home_folder_is_sourced(home_with_cann: Path) -> None:
    variables = npu_environment(home_with_cann)
    assert variables["ASCEND_HOME_PATH"] == "here"
    assert variables["HCCL_WHITELIST_DISABLE"] == "1"
    assert variables["TASK_QUEUE_ENABLE"] == "2"
    assert int(variables["HCCL_CONNECT_TIMEOUT"]) == 1200


@pytest.mark.parametrize(
    "folder", ["cann", "cann/latest", "cann-9.1.0", "ascend-toolkit", "ascend-toolkit/latest", "nnae", "nnae/latest"]
)
def test_cann_is_found_wherever_it_installs_itself(tmp_path: Path, folder: str) -> None:
    write_script(tmp_path / "Ascend" / folder / "set_env.sh", f"export ASCEND_HOME_PATH={folder}\n")
    assert npu_environment(tmp_path)["ASCEND_HOME_PATH"] == folder


def test_of_several_versions_the_newest_is_taken(tmp_path: Path) -> None:
    for version in ("9.1.0", "10.0.0", "8.5.0"):
        write_script(tmp_path / f"Ascend/cann-{version}/set_env.sh", f"export ASCEND_HOME_PATH={version}\n")
    assert npu_environment(tmp_path)["ASCEND_HOME_PATH"] == "10.0.0"


def test_a_cann_that_is_already_chosen_stays(home_with_cann: Path) -> None:
    assert npu_environment(home_with_cann, ASCEND_HOME_PATH="/opt/cann")["ASCEND_HOME_PATH"] == "/opt/cann"


def test_the_newest_layout_goes_first(home_with_cann: Path) -> None:
    write_script(home_with_cann / "Ascend/cann/set_env.sh", "export ASCEND_HOME_PATH=cann\n")
    assert npu_environment(home_with_cann)["ASCEND_HOME_PATH"] == "cann"


def test_only_what_is_unset_is_set(home_with_cann: Path) -> None:
    chosen = {"TASK_QUEUE_ENABLE": "0", "HCCL_CONNECT_TIMEOUT": "300", "HCCL_SOCKET_IFNAME": "eth7"}
    variables = npu_environment(home_with_cann, **chosen)
    assert {name: variables[name] for name in chosen} == chosen
    assert "HCCL_IF_IP" not in variables  # it would beat the chosen interface


@pytest.mark.parametrize("timeout", [180, 600, 1800, 7200])
def test_hccl_gives_up_before_the_process_group(home_with_cann: Path, timeout: int) -> None:
    assert 60 <= int(npu_environment(home_with_cann, str(timeout))["HCCL_CONNECT_TIMEOUT"]) < timeout


def test_a_longer_hccl_timeout_is_kept_and_named(home_with_cann: Path) -> None:
    script = f'source "{REPOSITORY}/test/env_npu.sh"; npu_environment 600; echo "$HCCL_CONNECT_TIMEOUT"'
    settings = {"PATH": os.environ["PATH"], "HOME": str(home_with_cann), "HCCL_CONNECT_TIMEOUT": "900"}
    done = subprocess.run(["bash", "-c", script], env=settings, capture_output=True, text=True, check=True)
    assert done.stdout == "900\n" and "should be less than --ddp_timeout 600" in done.stderr


def test_a_prepared_environment_or_none_is_left_alone(home_with_cann: Path, tmp_path: Path) -> None:
    assert "ASCEND_HOME_PATH" not in npu_environment(home_with_cann, etp_running_flag="true")
    if not Path("/usr/local/Ascend").exists():
        assert not [name for name in npu_environment(tmp_path / "nobody") if name.startswith("HCCL")]
