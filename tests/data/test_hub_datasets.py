"""The hub path with the real client libraries against a loopback hub, and saved data sets."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import loopback_hub
import pytest

from bert_glue.config.arguments import Arguments
from bert_glue.data.hub_datasets import GLUE_NAME, GLUE_REVISION, hub_address
from bert_glue.data.sources import load_task_data
from bert_glue.errors import DataError

REPOSITORY = Path(__file__).parents[2]
ALL = frozenset({"train", "evaluation", "test"})

# The libraries read their environment at import, hence a process of its own for each environment.
CLIENT = """
import json, sys, time
from bert_glue.config.arguments import Arguments
from bert_glue.errors import UserError
from bert_glue.data.sources import load_task_data
answers = []
for flags in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        data = load_task_data(Arguments(**flags), frozenset(("train", "evaluation", "test")))
        answer = {
            "source": data.source,
            "warnings": data.warnings,
            "labels": {name: split.labels for name, split in data.splits.items()},
            "first": data.splits["train"].texts[0][0],
            "origin": data.splits["train"].origin,
        }
    except UserError as error:
        answer = {"error": str(error), "exit_code": error.exit_code}
    answers.append({**answer, "seconds": time.monotonic() - start})
print(json.dumps(answers))
"""


def limit() -> float:
    """The time limit for noticing a missing hub: 5 s on idle cores, more on shared ones."""
    return 5.0 * max(1.0, os.getloadavg()[0] / os.cpu_count()) + (2.0 if os.environ.get("PYTEST_XDIST_WORKER") else 0.0)


def start(folder, home, runs, **environment):
    """A client process, its current folder `folder`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    clean |= {"HF_HOME": str(home), "PYTHONPATH": str(REPOSITORY), "NO_PROXY": "*"} | environment
    command = [sys.executable, "-c", CLIENT, json.dumps(runs)]
    return subprocess.Popen(command, env=clean, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def answers(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return json.loads(out.splitlines()[-1])


def task_runs(*names, **flags):
    return [{"task_name": name, **flags} for name in names]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Answers of clients: cold, then with the hub gone, and the hub's log."""
    folder = tmp_path_factory.mktemp("hub")
    if hub_address(GLUE_NAME, datasets.__version__) != GLUE_NAME:  # older versions refuse, tested below
        # A local folder of the data set's name must not be read instead.
        (folder / "nyu-mll" / "glue").mkdir(parents=True)
        (folder / "nyu-mll" / "glue" / "train.csv").write_text("sentence1,sentence2,label\nwrong,wrong,1\n")
    loopback_hub.make_repository(folder / "repository")
    home = folder / "home"
    with loopback_hub.serve(folder / "repository", GLUE_NAME, GLUE_REVISION) as server:
        environment = {"HF_ENDPOINT": server.url}
        own = {"dataset_name": GLUE_NAME, "dataset_config_name": "mrpc"}
        runs = [*task_runs("mrpc", "stsb", "mnli", "rte", "cola"), own]
        cold = answers(start(folder, home, runs, **environment))
        elsewhere = task_runs("mrpc", cache_dir=str(folder / "elsewhere"))
        cold += answers(start(folder, folder / "other", elsewhere, **environment))
        asked = list(server.asked)
    offline = start(folder, home, task_runs("mnli", "wnli"), HF_HUB_OFFLINE="1", **environment)
    gone = start(folder, home, task_runs("mrpc", "sst2"), **environment)
    return {
        "cold": cold,
        "offline": answers(offline),
        "gone": answers(gone),
        "asked": asked,
        "folder": folder,
    }


@pytest.mark.parametrize("place", ["squad", "nyu-mll/glue"])
def test_a_local_folder_never_stands_for_the_hub(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    assert [hub_address(place, version) for version in ("4.8.0", "5.2.0.dev0")] == [f"hf://datasets/{place}"] * 2
    assert [hub_address(place, version) for version in ("3.0.0", "4.7.1", "4.4")] == [place] * 3
    Path(place).mkdir(parents=True)
    assert hub_address(place, "4.8.5") == f"hf://datasets/{place}"
    with pytest.raises(DataError, match=f"datasets 4.7.1 reads the local {place} .*--dataset_name ./{place}"):
        hub_address(place, "4.7.1")


def test_cold_load_from_the_hub(hub):
    mrpc, stsb = hub["cold"][:2]
    assert mrpc["labels"] == {"train": [1, 0, 1, 1], "validation": [0, 1], "test": None}
    assert mrpc["first"] == "mrpc train sentence1 0"
    assert mrpc["source"] == f"hub nyu-mll/glue@{GLUE_REVISION} mrpc"
    assert stsb["labels"] == {"train": [5.0, 0.0, 2.5], "validation": [3.75], "test": None}
    assert any(f"/resolve/{GLUE_REVISION}/mrpc/train" in line for line in hub["asked"])


def test_labels_are_matched_by_name_and_the_companion_comes_along(hub):
    mnli = hub["cold"][2]
    # the loopback hub numbers contradiction 0, entailment 1, neutral 2
    assert mnli["labels"]["train"] == [2, 0, 1]
    assert mnli["labels"]["validation_mismatched"] == [1, 2]
    assert mnli["labels"]["ax:test"] is None and mnli["warnings"] == []


def test_an_unlabelled_training_row_is_refused(hub):
    error = hub["cold"][3]
    assert error["exit_code"] == 3
    assert "rte train row 3: label -1 means unlabelled" in error["error"]


def test_what_the_hub_does_not_have(hub):
    error = hub["cold"][4]
    assert error["exit_code"] == 3 and "did not provide it: BuilderConfig 'cola' not found" in error["error"]


def test_a_data_set_by_name_keeps_its_class_names(hub):
    own = hub["cold"][5]
    assert own["labels"]["train"] == [1, 0, 1, 1] and own["labels"]["test"] is None
    assert own["source"].startswith(f"nyu-mll/glue@{GLUE_REVISION} mrpc (texts: sentence1, sentence2; 2 classes")


def test_cache_dir(hub):
    assert hub["cold"][6]["labels"]["validation"] == [0, 1]
    assert list((hub["folder"] / "elsewhere").rglob(f"{GLUE_REVISION}/glue-train.arrow"))
    assert not list((hub["folder"] / "other").rglob("*.arrow"))


def test_warm_cache_in_offline_mode(hub):
    warm, cold = hub["offline"]
    assert warm["labels"]["train"] == [2, 0, 1] and warm["labels"]["ax:test"] is None
    assert cold["exit_code"] == 3 and "HF_HUB_OFFLINE is set" in cold["error"] and cold["seconds"] < limit()


def test_hub_gone_warm_and_cold(hub):
    warm, cold = hub["gone"]
    assert warm["labels"]["train"] == [1, 0, 1, 1] and warm["seconds"] < limit()
    assert cold["exit_code"] == 3 and cold["seconds"] < limit()
    assert "Connection refused" in cold["error"]
    for way_out in (
        "--data_path",
        "--sample",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE=1",
        str(hub["folder"] / "home"),
    ):
        assert way_out in cold["error"]


def test_a_hub_that_never_answers_and_a_cache_of_another_revision(hub, tmp_path):
    made = next((hub["folder"] / "home").rglob(f"mrpc/0.0.0/{GLUE_REVISION}"))
    other = tmp_path / made.parent.relative_to(hub["folder"] / "home") / ("0" * 40)
    other.parent.mkdir(parents=True)
    os.symlink(made, other)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        mute = start(tmp_path, tmp_path / "empty", task_runs("mrpc"), HF_ENDPOINT=endpoint)
        stale = start(tmp_path, tmp_path, task_runs("mrpc"), HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
        (slow,), (wrong,) = answers(mute), answers(stale)
    assert slow["exit_code"] == 3 and slow["seconds"] < limit()
    assert "no answer within 3 s" in slow["error"] or "timed out" in slow["error"]
    assert wrong["exit_code"] == 3
    assert f"the cache holds revision {'0' * 40}, not the pinned {GLUE_REVISION}" in wrong["error"]


# --- saved data sets --------------------------------------------------------------------------------


def load(folder, task="mrpc", needed=ALL):
    return load_task_data(Arguments(task_name=task, data_path=str(folder)), frozenset(needed))


def saved(labels, names=("equivalent", "not_equivalent")):
    import datasets

    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(names)),
        }
    )
    rows = {"sentence1": [f"NA {at} " for at in range(len(labels))], "sentence2": ["x"] * len(labels)}
    return datasets.Dataset.from_dict({**rows, "label": labels}, features=features)


@pytest.mark.parametrize("place", ["", "mrpc", "MRPC"])
@pytest.mark.parametrize("is_dict", [True, False])
def test_saved_data_sets(tmp_path, place, is_dict):
    import datasets

    splits = {"train": saved([0, 1]), "validation": saved([1]), "test": saved([-1])}
    if is_dict:
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / place))
    else:
        for name, data in splits.items():
            data.save_to_disk(str(tmp_path / place / name.replace("validation", "dev")))
    data = load(tmp_path)
    assert data.source == f"saved data sets {tmp_path / place}"
    # the saved set numbers its classes the other way round than the task table
    assert [split.labels for split in data.splits.values()] == [[1, 0], [0], None]
    assert data.splits["train"].texts[0] == ["NA 0 ", "NA 1 "]


def test_saved_splits_of_mnli_and_a_missing_one(tmp_path):
    names = ("contradiction", "neutral", "entailment")
    data = saved([0, 1, 2], names).rename_columns({"sentence1": "premise", "sentence2": "hypothesis"})
    for split in ("train", "validation_matched", "validation_mismatched"):
        data.save_to_disk(str(tmp_path / split))
    found = load(tmp_path, "mnli", {"train", "evaluation"})
    assert [split.labels for split in found.splits.values()] == [[2, 1, 0]] * 3
    with pytest.raises(DataError, match="no test_matched, test_mismatched; splits there: train, validation_m"):
        load(tmp_path, "mnli", {"test"})


def test_saved_rows_that_were_selected_keep_their_order(tmp_path):
    saved([0, 1, 0]).select([1, 2]).save_to_disk(str(tmp_path / "train"))
    train = load(tmp_path, needed={"train"}).splits["train"]
    assert train.texts[0] == ["NA 1 ", "NA 2 "] and train.labels == [0, 1]


def test_broken_saved_data_sets(tmp_path):
    saved([0, -1]).save_to_disk(str(tmp_path / "train"))
    with pytest.raises(DataError, match="train row 2: label -1 means unlabelled"):
        load(tmp_path, needed={"train"})
    saved([0], names=("yes", "no")).save_to_disk(str(tmp_path / "names" / "train"))
    with pytest.raises(DataError, match="'yes', 'no' do not match"):
        load(tmp_path / "names", needed={"train"})
    next((tmp_path / "train").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        load(tmp_path, needed={"train"})
