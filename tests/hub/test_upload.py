"""--push_to_hub with the real client, to a hub on this machine: what is sent, what never is, what a failure costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import loopback_hub
import pytest
import yaml
from safetensors.torch import load
from tiny_run import REPOSITORY, arguments, flags_of

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def hub(tmp_path):
    with loopback_hub.serve(tmp_path / "nothing", "nobody/nothing", "0" * 40) as server:
        yield server


def run(tmp_path, hub, *more: str, offline: str = "0", **changes):
    args = arguments(tmp_path, max_steps=2, do_eval=True, do_predict=True, push_to_hub=True, **changes)
    environment = {n: v for n, v in os.environ.items() if n.lower() not in ("http_proxy", "all_proxy", "hf_token")}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "run_glue.py"), *flags_of(args), *more], capture_output=True, text=True,
        timeout=120, cwd=REPOSITORY,
        env={
            **environment, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": offline, "HOME": str(tmp_path),
            "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip


def all_text_of(tmp_path, done) -> str:
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    return done.stdout + done.stderr + "".join(p.read_bytes().decode("latin-1") for p in files)


def test_the_model_its_card_and_scores_are_sent_and_no_secret(tmp_path, hub):
    done = run(tmp_path, hub, "--hub_token", TOKEN, hub_model_id="trial", hub_private_repo=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        hub.created == [{"name": "trial", "organization": None, "private": True}] or hub.created[0]["name"] == "trial"
    )
    assert f"sent to {hub.url}/someone/trial/commit/1" in done.stdout
    assert {"config.json", "model.safetensors", "vocab.txt", "README.md", "eval_results.json"} <= set(hub.sent)
    unsent = ("run.json", "report.html", "analysis.json", "trainer_state.json", "predict")
    assert not [name for name in hub.sent if name.startswith(unsent) or "checkpoint" in name]
    assert load(hub.sent["model.safetensors"])
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    assert TOKEN not in all_text_of(tmp_path, done) + "".join(map(repr, hub.sent.values()))
    card = hub.sent["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["pipeline_tag"] == "text-classification" and "base_model" not in head  # a path is nobody's model
    for part in ("## Results", "## Recipe", "## Hashes", "## Licence", "Trained: all"):
        assert part in card
    assert "--hub_" not in card
    assert not [name for name, content in hub.sent.items() if str(tmp_path).encode() in content]  # where it all lay


def test_adapters_are_sent_without_the_place_of_their_base(tmp_path, hub):
    pytest.importorskip("peft")
    done = run(tmp_path, hub, "--hub_token", TOKEN, hub_model_id="trial", lora_rank=2)
    assert done.returncode == 0, done.stderr[-2000:]
    here = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    sent = json.loads(hub.sent["adapter/adapter_config.json"])
    assert here["base_model_name_or_path"] == str(tmp_path / "model") and sent["base_model_name_or_path"] is None
    assert {**here, "base_model_name_or_path": None} == sent and "adapter/adapter_model.safetensors" in hub.sent
    assert not [name for name, content in hub.sent.items() if str(tmp_path).encode() in content]


def test_a_refusal_before_training_costs_no_training(tmp_path, hub):
    hub.fails["/api/repos/create"] = 401
    done = run(tmp_path, hub, "--hub_token", TOKEN, hub_model_id="trial")
    assert done.returncode == 4 and "nothing has been trained yet" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out/model.safetensors").exists() and TOKEN not in all_text_of(tmp_path, done)


@pytest.mark.parametrize("status", [403, 500])
def test_a_refusal_after_training_costs_nothing_of_the_result(tmp_path, hub, status):
    hub.fails["/api/models/someone/trial/commit/main"] = status
    done = run(tmp_path, hub, "--hub_token", TOKEN, hub_model_id="trial")
    assert done.returncode == 4 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "--push_to_hub" in line]
    assert "was not uploaded to someone/trial" in line
    assert f"`hf upload someone/trial {tmp_path / 'out'}` uploads them" in line
    for name in ("model.safetensors", "all_results.json", "report.html", "README.md"):
        assert (tmp_path / "out" / name).exists()
    assert TOKEN not in all_text_of(tmp_path, done)


def test_without_a_token_and_without_a_network_it_ends_at_once(tmp_path, hub):
    done = run(tmp_path, hub)
    assert done.returncode == 4 and "no token; give --hub_token" in done.stderr
    done = run(tmp_path, hub, offline="1", hub_token=TOKEN)
    assert done.returncode == 4 and "HF_HUB_OFFLINE is set" in done.stderr and not hub.created


def test_flags_that_need_push_to_hub(tmp_path):
    from bert_glue.config.parser import parse
    from bert_glue.errors import UsageError

    base = ["--task_name", "rte", "--sample", "--output_dir", "out"]
    for flags, says in (
        (["--do_eval", "--push_to_hub"], "--push_to_hub needs --do_train"),
        (["--do_train", "--push_to_hub", "--hub_model_id", "a/b/c"], "is not NAME or OWNER/NAME"),
        (["--do_train", "--push_to_hub_organization", "x"], "--hub_model_id OWNER/NAME"),
    ):
        with pytest.raises(UsageError) as refused:
            parse([*base, *flags])
        assert says in str(refused.value)
    args = parse([*base, "--do_train", "--hub_model_id", "x", "--hub_token", TOKEN])
    assert [n for n in args.notices if "without --push_to_hub" in n and TOKEN not in n] == list(args.notices)
