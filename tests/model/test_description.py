"""The description is stored with the weights, and later commands do not replace it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import arguments, changed, make_data, make_model, results_of

from bert_glue.errors import MachineError, UsageError
from bert_glue.model.description import FILE, read_description
from bert_glue.pipeline import run as pipeline
from bert_glue.predict import __main__ as predict
from bert_glue.storage.files import file_hash

LONG = "a dog runs today here again slowly near the old mill"


def write(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def label(model: Path | list[Path], source: Path, *more: str) -> list[dict[str, str]]:
    target, models = source.with_suffix(".out.csv"), model if isinstance(model, list) else [model]
    words = ["--model", *map(str, models), "--input", str(source), "--output", str(target), "--device", "cpu"]
    assert predict.main([*words, "--overwrite", *more]) == 0
    with target.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained at 9 tokens, with a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    args = arguments(folder, max_seq_length=9, num_train_epochs=4.0, save_strategy="epoch", do_eval=True)
    assert pipeline.run(args) == 0
    return args


def probabilities(rows: list[dict[str, str]]) -> list[str]:
    return [row["probability_yes"] for row in rows]


@pytest.mark.parametrize("part", ["", "checkpoint-16"])
def test_the_file_lies_with_the_weights(run, part):
    folder = Path(run.output_dir) / part
    found = read_description(folder)
    assert (found["max_seq_length"], found["text_columns"]) == (9, ["sentence1", "sentence2"])
    assert found["dtype"] == "float32" == json.loads((folder / "config.json").read_text())["dtype"]
    assert found["weights_sha256"] == file_hash(folder / "model.safetensors")
    assert found["recipe"]["learning_rate"] == run.learning_rate and "token" not in found["recipe"]
    assert found["data_sha256"].keys() == {"train", "validation"}
    assert str(folder.parent.parent) not in (folder / FILE).read_text(), "it may be published"


def test_a_checkpoint_answers_as_the_run(run, tmp_path):
    source = write(tmp_path / "in.csv", ["title", "sentence1", "sentence2"], [["x", LONG, LONG], ["y", "a cat", LONG]])
    whole = label(Path(run.output_dir), source)
    assert whole == label(Path(run.output_dir) / "checkpoint-16", source)
    assert whole != label(Path(run.output_dir), source, "--max_seq_length", "32")


def test_a_copied_folder_answers_as_the_run(run, tmp_path):
    """As a push to the hub leaves it: without results."""
    copy = tmp_path / "copy"
    shutil.copytree(run.output_dir, copy, ignore=lambda *_: ["run.json", "all_results.json", "checkpoint-16"])
    source = write(tmp_path / "in.csv", ["sentence1", "sentence2"], [[LONG, LONG]])
    assert label(copy, source) == label(Path(run.output_dir), source)


def test_a_run_and_its_checkpoint_of_an_earlier_version_still_work(run, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(run.output_dir, old)
    for file in old.rglob(FILE):
        file.unlink()
    source = write(tmp_path / "in.csv", ["sentence1", "sentence2"], [[LONG, LONG]])
    assert label(old, source) == label(old / "checkpoint-16", source) == label(Path(run.output_dir), source)
    for name in ("run.json", "all_results.json"):
        (old / name).unlink()
    assert read_description(old) == {} == read_description(old / "checkpoint-16")


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"max_seq_length": 2}', '{"text_columns": "a"}', '{"max_seq_length": "9"}']
)
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(MachineError, match=FILE):
        read_description(tmp_path)


@pytest.mark.parametrize("later", [{"do_predict": True}, {"do_eval": True}, {"do_eval": True, "do_predict": True}])
def test_a_later_command_adds_to_the_results(run, tmp_path, later):
    out = tmp_path / "out"
    shutil.copytree(run.output_dir, out)
    before, record = results_of(run), results_of(run, "run.json")
    told = (out / FILE).read_bytes()
    flags = {"do_train": False, "do_eval": False, "max_seq_length": 32, **later}
    args = changed(run, output_dir=str(out), model_name_or_path=str(out), **flags)
    assert pipeline.run(args) == 0
    after = results_of(args)
    assert {k: v for k, v in after.items() if not k.startswith(("eval_", "predict_"))} == {
        k: v for k, v in before.items() if not k.startswith("eval_")
    }
    assert after["eval_accuracy"] is not None
    assert ("predict_samples_own" in after) == ("do_predict" in later)
    now = results_of(args, "run.json")
    assert {k: v for k, v in now.items() if k != "later"} == record
    assert [entry["arguments"]["do_train"] for entry in now["later"]] == [False]
    assert (out / FILE).read_bytes() == told
    assert results_of(args, "analysis.json")["splits"]


def test_another_model_is_not_scored_into_the_folder(run, tmp_path):
    checkpoint = Path(run.output_dir) / "checkpoint-16"
    other = make_model(tmp_path / "other")
    for model in (other,):
        with pytest.raises(UsageError, match="--output_dir.*another one"):
            pipeline.run(changed(run, do_train=False, do_eval=True, model_name_or_path=str(model)))
    # The last checkpoint holds the same weights: it is the same model.
    assert pipeline.run(changed(run, do_train=False, do_eval=True, model_name_or_path=str(checkpoint))) == 0


def test_new_weights_take_the_scores_of_the_old_ones_away(tmp_path):
    args = arguments(tmp_path, do_eval=True)
    assert pipeline.run(args) == 0
    assert pipeline.run(changed(args, do_eval=False)) == 0
    assert "eval_accuracy" not in results_of(args)
    assert not (tmp_path / "out" / "eval_results.json").exists() and not (tmp_path / "out" / "analysis.json").exists()


def test_evaluations_of_two_models_into_one_folder_are_not_mixed(run, tmp_path):
    out, data = str(tmp_path / "scores"), make_data(tmp_path / "data")
    first = changed(run, do_train=False, do_eval=True, output_dir=out, model_name_or_path=run.output_dir, **data)
    assert pipeline.run(first) == 0
    assert pipeline.run(changed(first, do_eval=False, do_predict=True)) == 0
    assert {"eval_accuracy", "predict_samples_own"} <= results_of(first).keys()
    other = make_model(tmp_path / "other")
    assert pipeline.run(changed(first, do_eval=False, do_predict=True, model_name_or_path=str(other))) == 0
    assert "eval_accuracy" not in results_of(first)


def test_each_member_of_an_ensemble_reads_its_own_columns_at_its_own_length(run, tmp_path):
    """Two models trained on differently named columns, lengths and orders of labels."""
    renamed = make_data(tmp_path / "data")
    for path in map(Path, renamed.values()):
        path.write_text(path.read_text().replace("sentence1,sentence2", "premise,hypothesis"))
    args = arguments(tmp_path, max_seq_length=24, seed=7, num_train_epochs=4.0, **renamed)
    assert pipeline.run(args) == 0
    second, first = tmp_path / "out", Path(run.output_dir)
    source = write(
        tmp_path / "in.csv", ["sentence1", "sentence2", "premise", "hypothesis"],
        [[LONG, LONG, "a cat sings", "a cat rests"], ["a dog", LONG, LONG, "a bird"]],
    )  # fmt: skip
    alone = [[float(value) for value in probabilities(label(model, source))] for model in (first, second)]
    together = [float(value) for value in probabilities(label([first, second], source))]
    assert together == pytest.approx(list(np.mean(alone, axis=0)), abs=2e-6)


def test_members_with_labels_in_another_order_are_averaged_by_name(run, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    turned = tmp_path / "turned"
    shutil.copytree(run.output_dir, turned)
    config = json.loads((turned / "config.json").read_text())
    config |= {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}
    (turned / "config.json").write_text(json.dumps(config))
    tensors = load_file(turned / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = torch.flip(tensors[name], [0]).contiguous()
    save_file(tensors, turned / "model.safetensors", {"format": "pt"})
    source = write(tmp_path / "in.csv", ["sentence1", "sentence2"], [[LONG, LONG], ["a dog sings", "a dog runs"]])
    assert label([Path(run.output_dir), turned], source) == label(Path(run.output_dir), source)


@pytest.mark.parametrize(("given", "length"), [(frozenset(), 9), (frozenset({"max_seq_length"}), 32), (None, 32)])
def test_scoring_alone_cuts_as_training_did(run, tmp_path, given, length):
    from dataclasses import replace

    out = str(tmp_path / "scores")
    args = changed(run, do_train=False, output_dir=out, model_name_or_path=run.output_dir, max_seq_length=32)
    assert pipeline.run(replace(args, given=given)) == 0
    assert results_of(args)["max_seq_length"] == length
