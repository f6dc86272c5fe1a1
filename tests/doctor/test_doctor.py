"""The doctor as a black box on machines broken in every way a test can arrange, and its proof of training."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from simulated_runs import needs_simulated_npu

from bert_glue.config.parser import parse
from bert_glue.devices import host_memory, npu_versions
from bert_glue.doctor import __main__ as doctor
from bert_glue.doctor import checks, device_probe
from bert_glue.errors import DivergedError
from bert_glue.training import losses

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "bert_glue.doctor"]


def environment(*packages: Path, **settings: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    path = os.pathsep.join(map(str, (*packages, REPOSITORY)))
    offline = {} if "HF_ENDPOINT" in settings else {"HF_HUB_OFFLINE": "1"}
    return {**kept, **offline, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **settings}


def examined(*flags: str, packages: tuple[Path, ...] = (), **settings: str) -> tuple[int, dict]:
    """Exit code and report of `--json`; whatever is broken, there is no traceback."""
    done = subprocess.run(
        [*COMMAND, "--json", *flags], env=environment(*packages, **settings), capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    report = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode
    assert all(problem["what"] and problem["fix"] for problem in report["problems"])
    return done.returncode, report


def problems(report: dict) -> str:
    return "\n".join(f"{problem['what']} => {problem['fix']}" for problem in report["problems"])


def package(folder: Path, name: str, code: str, entry_points: str = "", version: str = "2.13.0") -> Path:
    """A folder for PYTHONPATH with one package in it."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    record = folder / f"{name}-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (record / "entry_points.txt").write_text(entry_points)
    return folder


@pytest.fixture
def no_torch(tmp_path: Path) -> Path:
    """Hides torch: for tests of everything else, in a tenth of the time."""
    return package(tmp_path / "no_torch", "torch", "raise ImportError('libtorch.so: cannot open shared object file')")


# On the host


def test_text_names_what_was_found_and_trained() -> None:
    done = subprocess.run(COMMAND, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("verdict: cpu trains\n")
    for part in ("fp32                trains: O0 fp32, 2 steps, loss", "blocks of rows", "default recipe"):
        assert part in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 240


def test_json_holds_the_proof() -> None:
    code, report = examined("--device", "cpu")
    assert code == 0 and report["can_train"]
    assert report["auto"]["device"] == report["chosen"]["device"] == "cpu"
    for precision in ("fp32", "bf16"):
        first, second = report["training"][precision]["losses"]
        assert 0.5 < second < first < 0.9
    assert report["training"]["fp32"]["attention"] == ["packed: blocks of rows"]
    assert report["versions"]["torch"] == report["torch"]["version"].split("\n")[0]
    assert report["memory"]["total_bytes"] >= report["memory"]["available_bytes"] > 0
    assert report["hub"]["state"] == "offline" and "problem" not in problems(report)


@pytest.mark.parametrize(("device", "code", "says"), [("npu:1", 4, "set_env.sh"), ("nup", 2, "Did you mean npu?")])
def test_a_device_that_is_not_here(device: str, code: int, says: str) -> None:
    returned, report = examined("--device", device)
    assert returned == code and not report["can_train"] and says in problems(report)


@needs_simulated_npu
def test_the_simulated_npu_trains_and_says_that_it_is_simulated() -> None:
    """Call signatures and flow only, as everything on the simulated device."""
    code, report = examined("--device", "npu", packages=(REPOSITORY / "tests/support/simulated_npu",))
    assert code == 0 and report["chosen"]["device"] == report["auto"]["device"] == "npu:0"
    assert [device["device"] for device in report["devices"]] == ["npu:0", "npu:1", "cpu"]
    assert all(device["name"].startswith("simulated ") for device in report["devices"][:2])
    for precision in ("fp32", "bf16", "fp16"):
        assert report["training"][precision]["attention"] == ["packed: npu_fusion_attention, TND"]
    assert report["recipe"]["precision"] == "O2 fp16, loss scale 1024"


@needs_simulated_npu
def test_an_index_beyond_the_simulated_devices() -> None:
    code, report = examined("--device", "npu:7", packages=(REPOSITORY / "tests/support/simulated_npu",))
    assert code == 4 and "npu device 7 is not here, there are 2 => choose one below 2" in problems(report)


# Broken installations


def test_a_torch_npu_that_cannot_be_imported(tmp_path: Path) -> None:
    broken = package(tmp_path, "torch_npu", "raise ImportError('libascendcl.so: undefined symbol: aclrtFoo')")
    code, report = examined("--device", "cpu", packages=(broken,))
    assert code == 0  # the host is not to blame
    assert "undefined symbol: aclrtFoo" in problems(report) and "set_env.sh" in problems(report)
    assert report["versions"]["torch_npu"] == "2.13.0"


def test_a_torch_npu_that_would_break_torch_itself(tmp_path: Path) -> None:
    entry = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
    broken = package(tmp_path, "torch_npu", "raise ImportError('libhccl.so: no such file')", entry)
    code, report = examined("--device", "cpu", packages=(broken,))
    assert code == 0 and "CANN is not installed" in problems(report)
    code, report = examined("--device", "npu", packages=(broken,))
    assert code == 4 and "libhccl.so: no such file" in problems(report)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ImportError('libtorch.so: cannot open')", "cannot be imported: libtorch.so"),
        ("import sys; sys.exit('no licence')", "cannot be imported: no licence"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV while Python started"),
        ("print('noise of a driver'); raise RuntimeError", "cannot be imported: RuntimeError"),
    ],
)
def test_a_torch_that_fails(tmp_path: Path, code: str, says: str) -> None:
    returned, report = examined(packages=(package(tmp_path, "torch", code),))
    assert returned == 4 and says in problems(report) and report["devices"] == []


def test_a_device_that_hangs_is_given_up_and_leaves_no_process(tmp_path: Path) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    began = time.monotonic()
    returned, report = examined("--time_limit", "2", packages=(package(tmp_path, "torch", code),))
    assert returned == 4 and "no answer within 2 s" in problems(report)
    assert time.monotonic() - began < 20
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_packages_that_are_missing_or_old(no_torch: Path, tmp_path: Path) -> None:
    old = package(tmp_path / "old", "transformers", "", version="4.18.0")
    _, report = examined(packages=(no_torch, old))
    assert "transformers 4.18.0 is outside the tested range 4.44 to 5.x" in problems(report)
    shown = next(row for row in report["stack"] if row["name"] == "transformers")
    assert shown == {"name": "transformers", "version": "4.18.0", "verdict": "outside the tested range, 4.44 to 5.x"}


@pytest.mark.parametrize(
    ("files", "amp", "shown"),
    [
        ({"__init__.py": ""}, False, "without amp"),
        ({"__init__.py": "", "amp.py": "def initialize(): pass"}, True, "with amp"),
        ({"__init__.py": "raise OSError('no kernels')"}, None, "cannot be imported: no kernels"),
    ],
)
def test_apex_with_or_without_amp(tmp_path, monkeypatch, files: dict, amp: bool | None, shown: str) -> None:
    (tmp_path / "apex").mkdir()
    for name, text in files.items():
        (tmp_path / "apex" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("apex", "apex.amp"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        found = device_probe._apex()
        assert found["amp"] is amp
    except OSError as error:
        assert amp is None
        found = {"problem": str(error)}
    from bert_glue.doctor.__main__ import _apex

    assert shown in _apex(found)
    for name in ("apex", "apex.amp"):
        sys.modules.pop(name, None)


# Broken hosts


def test_without_proc() -> None:
    inside = "mount -t tmpfs none /proc && exec " + " ".join([*COMMAND, "--json"])
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*command, "mount -t tmpfs none /proc"]).returncode:
        pytest.skip("the kernel forbids name spaces here")
    done = subprocess.run([*command, inside], env=environment(), capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["can_train"] and report["memory"]["total_bytes"] > 0


def test_a_home_that_cannot_be_written(no_torch: Path) -> None:
    _, report = examined(packages=(no_torch,), HOME="/proc")
    assert "set BERT_GLUE_CACHE" in problems(report) and "set HF_HOME" in problems(report)
    assert [place["writable"] for place in report["disk"]] == [True, True, False, False]


def test_master_port(no_torch: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        _, report = examined(packages=(no_torch,), MASTER_PORT=taken)
        assert f"MASTER_PORT={taken}: address already in use => unset MASTER_PORT" in problems(report)
        _, report = examined(packages=(no_torch,), MASTER_PORT=taken, RANK="3")  # another rank listens
        assert report["ports"]["MASTER_PORT"]["usable"]
    _, report = examined(packages=(no_torch,), MASTER_PORT="ssh")
    assert "MASTER_PORT=ssh: it is not a port" in problems(report) and report["ports"]["free_port"]


def test_little_memory_and_disk(monkeypatch) -> None:
    found: list[doctor.Problem] = []
    monkeypatch.setattr(host_memory, "_container_limit", lambda: 1 << 30)
    assert checks.memory(found)["total_bytes"] == 1 << 30
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1 << 28))
    checks.disk(found)
    assert [problem.what[:14] for problem in found] == ["only 1.0 GiB o", "0.2 GiB free h"]


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("version.cfg", "# version: 1.0\nruntime_running_version=[8.0.0:CANN-8.0]\n", None),
        ("version.info", "Version=8.1.RC1\nversion_dir=8.1\n", "8.1.RC1"),
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=x\nversion=8.3.RC1\n", "8.3.RC1"),
    ],
)
def test_cann_version(tmp_path, monkeypatch, file: str, text: str, version: str | None) -> None:
    path = tmp_path / "Ascend/ascend-toolkit/latest" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    assert npu_versions.cann_version() == (version or "8.0.0")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert npu_versions.cann_version() is None or Path("/usr/local/Ascend").exists()


# The hub


class _Front(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:  # noqa: N802
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def front_page(context: ssl.SSLContext | None = None):
    server = HTTPServer(("127.0.0.1", 0), _Front)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_the_hub_of_hf_endpoint_and_no_secret_of_it(no_torch: Path) -> None:
    with front_page() as port:
        host = f"me:secret@127.0.0.1:{port}"
        _, report = examined(packages=(no_torch,), HF_ENDPOINT=f"http://{host}")
    assert report["hub"]["endpoint"] == f"http://127.0.0.1:{port}"
    assert "secret" not in json.dumps(report)
    with front_page() as port:
        _, report = examined(packages=(no_torch,), HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert report["hub"]["state"] == "reachable" and not report["hub"]["certificate_verified"]


def test_a_silent_hub_is_a_state_within_five_seconds(monkeypatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
        found: list[doctor.Problem] = []
        began = time.monotonic()
        result = checks.HubCheck().result(found)
        assert time.monotonic() - began < 5.0 and result["state"] == "not reachable" and not found


def test_a_certificate_is_verified(no_torch: Path, tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with front_page(context) as port:
        address = f"https://localhost:{port}"
        _, report = examined(packages=(no_torch,), HF_ENDPOINT=address)
        assert "certificate is refused" in problems(report) and "SSL_CERT_FILE" in problems(report)
        _, report = examined(packages=(no_torch,), HF_ENDPOINT=address, SSL_CERT_FILE=str(certificate))
        assert report["hub"]["state"] == "reachable" and report["hub"]["certificate_verified"]


# The proof


def test_weights_that_do_not_move_are_no_proof(monkeypatch) -> None:
    still = device_probe._arguments("cpu", {"fp16": False})
    monkeypatch.setattr(device_probe, "_arguments", lambda *_: replace(still, learning_rate=0.0))
    with pytest.raises(RuntimeError, match="did not change"):
        device_probe._training("cpu", {})


def test_a_loss_that_is_not_finite_is_no_proof(monkeypatch) -> None:
    real = losses.sample_losses
    monkeypatch.setattr(losses, "sample_losses", lambda *args: real(*args) * float("nan"))
    with pytest.raises(DivergedError):
        device_probe._training("cpu", {"fp16": False})


def test_the_recipe_is_the_launchers() -> None:
    """Recipe, changes and flags of the launcher, word for word."""
    text = (REPOSITORY / "test/train_full_1p.sh").read_text()
    words = [word for name in ("CHANGES", "FLAGS") for word in re.search(rf"{name}=\((.*?)\)", text)[1].split()]
    launcher = parse(
        [
            f"--recipe={re.search('RECIPE=(.*)', text)[1]}",
            *words,
            "--sample",
            "--task_name=sst2",
            "--output_dir=nowhere",
        ]
    )
    ours = device_probe._arguments("auto", {})
    for name in ("learning_rate", "logging_steps", "max_steps", "seed", "save_strategy", "disable_tqdm"):
        ours = replace(ours, **{name: getattr(launcher, name)})
    assert replace(launcher, dataloader_drop_last=False) == ours


def test_interruption_is_no_traceback(tmp_path: Path) -> None:
    slow = package(tmp_path, "torch", f"open({str(tmp_path / 'started')!r}, 'w'); import time; time.sleep(60)")
    child = subprocess.Popen(COMMAND, env=environment(slow), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == 130 and "Traceback" not in errors


def test_a_process_that_cannot_be_killed_is_left_behind() -> None:
    class Held:
        def communicate(self, timeout: float):
            raise subprocess.TimeoutExpired("probe", timeout, output=b'{"fact": "torch"}\n{"fa', stderr=None)

    assert doctor._rest_of(Held()) == (b'{"fact": "torch"}\n{"fa', b"")
