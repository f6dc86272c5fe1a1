"""A hub that is slow, disconnects, fails, truncates or sends wrong bytes: retries, no partial file, an error."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import loopback_hub
import pytest
from faulty_hub import self_signed, serve
from jobs import argv_of
from tiny_run import arguments, changed, make_model

from bert_glue.data.hub_datasets import GLUE_NAME, GLUE_REVISION
from bert_glue.hub import client

MODEL, COMMIT = "some/bert", "1" * 40


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    loopback_hub.make_repository(folder)
    return folder


def run(server, folder: Path, hub, name: str, **more):
    """A run against a hub with a home of its own; (exit code, output, seconds)."""
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "NO_PROXY": "*", "no_proxy": "*",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more,
    }  # fmt: skip
    began = time.monotonic()
    (folder / name).mkdir(exist_ok=True)
    if name == "model":
        args = arguments(folder, model_name_or_path=MODEL, max_steps=1, output_dir=str(folder / "out"))
    else:
        args = changed(
            arguments(folder, max_steps=1, output_dir=str(folder / "out")),
            task_name="mrpc", train_file=None, validation_file=None, test_file=None,
        )  # fmt: skip
    job = server.start(argv_of(args), folder, **environment)
    code = job.wait()
    return code, job.text(), time.monotonic() - began


def roots(what: str, glue: Path, folder: Path) -> tuple[Path, str, str, str]:
    """Root, name, commit and the file that the fault happens to."""
    if what == "model":
        return make_model(folder / "remote"), MODEL, COMMIT, "model.safetensors"
    return glue, GLUE_NAME, GLUE_REVISION, "mrpc/train-00000-of-00001.parquet"


# case -> (fault, how often, whether the run must, may or must not end because of it)
FAULTS = {
    "slow": ("slow", 1, "never"),
    "cut once": ("cut", 1, "never"),
    "cut always": ("cut", 1000, "always"),
    "500 once": ("error", 1, "never"),
    "500 always": ("error", 1000, "always"),
    "truncated always": ("truncated", 1000, "always"),
    "wrong once": ("wrong", 1, "perhaps"),  # rows may have been made from a wrong parquet file already
    "wrong always": ("wrong", 1000, "always"),
}
FAST = {("model", "cut once"), ("model", "wrong always"), ("data", "wrong always")}
CASES = [
    pytest.param(what, fault, marks=() if (what, fault) in FAST else pytest.mark.slow)
    for what in ("model", "data")
    for fault in FAULTS
]


@pytest.mark.parametrize(("what", "name"), CASES)
def test_a_faulty_hub(server, tmp_path, glue, report, what, name):
    fault, times, ends = FAULTS[name]
    root, repository, commit, target = roots(what, glue, tmp_path)
    with serve(root, repository, commit, fault, target, times) as hub:
        code, text, seconds = run(server, tmp_path, hub, what)
        hits = sum(hub.hits.values())
    assert "Traceback" not in text and seconds < 120 and hits <= 12
    assert code in {"never": (0,), "always": (4, 3), "perhaps": (0, 4, 3)}[ends], text[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file() == (code == 0)
    if code:
        assert code == {"model": 4, "data": 3}[what]
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert errors and repository in errors[0]
        assert fault != "wrong" or "does not have the hash that the hub gave" in text
    if code:
        # With the hub well again: what was half or wrong is not used, once the file that was named is gone.
        with serve(root, repository, commit) as hub:
            second, text, _ = run(server, tmp_path, hub, what)
            if "does not have the hash" in text:
                shutil.rmtree(tmp_path / "home")
                second, text, _ = run(server, tmp_path, hub, what)
            assert second == 0, text[-3000:]
    report(f"{what}, {name}: exit {code} after {hits} requests and {seconds:.1f} s; then with a hub that is well: 0")


def test_damage_in_the_cache_is_found_offline(server, tmp_path, glue):
    """A file of the cache that changed since it was fetched is not used."""
    root = make_model(tmp_path / "remote")
    with serve(root, MODEL, COMMIT) as hub:
        code, text, _ = run(server, tmp_path, hub, "model")
        assert code == 0, text[-3000:]
        (blob,) = {path.resolve() for path in (tmp_path / "home").rglob("snapshots/*/model.safetensors")}
        content = bytearray(blob.read_bytes())
        content[-3] ^= 1
        blob.write_bytes(content)
        code, text, _ = run(server, tmp_path, hub, "model", HF_HUB_OFFLINE="1")
        assert code == 4 and f"delete {blob}" in text
        code, text, _ = run(server, tmp_path, hub, "model")  # with the hub at hand it is fetched again
        assert code == 0, text[-3000:]


def test_a_file_is_asked_for_ten_times_at_most(tmp_path, monkeypatch):
    """The client resets its count of retries with each chunk, so it would retry large files forever."""
    import huggingface_hub
    from huggingface_hub import get_session

    monkeypatch.setenv("NO_PROXY", "*")
    root, before = make_model(tmp_path / "remote"), get_session()
    try:
        with serve(root, MODEL, COMMIT) as hub:
            client.prepare_client()
            address = f"{hub.url}/{MODEL}/resolve/{COMMIT}"
            for _ in range(client.MOST_REQUESTS):
                assert get_session().get(f"{address}/config.json").status_code == 200
            with pytest.raises(OSError, match="config.json was cut off 10 times"):
                get_session().get(f"{address}/config.json?download=true")
            assert get_session().get(f"{address}/vocab.txt").status_code == 200
    finally:
        if hasattr(huggingface_hub, "set_client_factory"):
            huggingface_hub.set_client_factory(lambda: type(before)(follow_redirects=True, timeout=None))
        else:
            huggingface_hub.configure_http_backend(lambda: before)


# ---- TLS ----


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("what", ["model", "data"])
def test_a_self_signed_server_is_refused(server, tmp_path, glue, certificate, report, what):
    root, repository, commit, _ = roots(what, glue, tmp_path)
    with serve(root, repository, commit, certificate=certificate[1]) as hub:
        code, text, _ = run(server, tmp_path, hub, what, SSL_CERT_FILE="", REQUESTS_CA_BUNDLE="", CURL_CA_BUNDLE="")
        assert code == {"model": 4, "data": 3}[what], text[-3000:]
        assert "certificate" in text.lower() and "Traceback" not in text
        assert not [line for line in hub.asked if "resolve" in line]
    report(f"{what} from a self-signed server: refused, exit {code}")


@pytest.mark.parametrize(
    ("what", "variable"),
    [
        ("model", "SSL_CERT_FILE"),
        ("data", "REQUESTS_CA_BUNDLE"),
        pytest.param("data", "SSL_CERT_FILE", marks=pytest.mark.slow),
        pytest.param("model", "CURL_CA_BUNDLE", marks=pytest.mark.slow),
    ],
)
def test_a_private_authority_is_accepted_where_it_is_named(server, tmp_path, glue, certificate, report, what, variable):
    root, repository, commit, _ = roots(what, glue, tmp_path)
    with serve(root, repository, commit, certificate=certificate[1]) as hub:
        others = {name: "" for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")}
        code, text, _ = run(server, tmp_path, hub, what, **{**others, variable: str(certificate[0])})
        assert code == 0, text[-3000:]
    report(f"{what} with {variable}: exit 0")
