"""What a run leaves behind: which files, which keys, the label of the sample, and no secret."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import arguments, changed, make_data, make_model, results_of

from bert_glue import result_keys as keys
from bert_glue.data.sample import SAMPLE_LABEL
from bert_glue.pipeline import outputs
from bert_glue.pipeline import run as pipeline
from bert_glue.results.model_card import model_card
from bert_glue.storage import files
from bert_glue.storage.files import file_hash
from bert_glue.tasks import TRAINABLE, get_task, own_task

TOKEN = "hf_secretsecretsecret"


class Finished:
    """One run with its settings, folder and console."""

    def __init__(self, args, console: str):
        self.args, self.folder, self.console = args, Path(args.output_dir), console

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")


def finish(args, capsys) -> Finished:
    assert pipeline.run(args) == 0
    return Finished(args, capsys.readouterr().out)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def own(tmp_path_factory, model) -> Finished:
    """Own data, everything on, a token on the command line in both spellings."""
    folder = tmp_path_factory.mktemp("own")
    args = arguments(
        folder, model_name_or_path=model, do_eval=True, do_predict=True, max_steps=4, token=TOKEN,
        eval_strategy="steps", eval_steps=2, **make_data(folder / "data"),
    )  # fmt: skip
    argv = sys.argv
    sys.argv = ["run_glue.py", "--token", TOKEN, f"--token={TOKEN}", "--seed", "42"]
    try:
        assert pipeline.run(args) == 0
    finally:
        sys.argv = argv
    return Finished(args, "")


def test_all_files_of_the_contract_are_there(own):
    expected = {
        "all_results.json", "train_results.json", "eval_results.json", "predict_results.json", "trainer_state.json",
        "predict_results_own.txt", "run.json", "README.md", "report.html", "curves.png", "train_loss.tsv",
        "config.json", "model.safetensors", "tokenizer.json", "vocab.txt", "tokenizer_config.json", "analysis.json",
        "bert_glue.json",
    }  # fmt: skip
    assert {p.name for p in own.folder.iterdir() if not p.name.startswith(".")} == expected
    assert (own.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_results_have_their_keys(own):
    everything = results_of(own.args)
    train, evaluation = results_of(own.args, "train_results.json"), results_of(own.args, "eval_results.json")
    assert {"train_loss", "train_runtime", "train_samples", "train_samples_per_second", "epoch"} <= set(train)
    metrics = {"eval_loss", "eval_accuracy", "eval_samples", "eval_runtime", "eval_samples_per_second"}
    assert metrics <= set(evaluation)
    for part in (train, evaluation):
        assert part.items() <= everything.items()
    assert not any(key.startswith("eval") for key in train)
    assert everything["train_samples"] == 29 and everything["epoch"] == 1.0 and everything["eval_samples"] == 13
    assert everything["predict_samples_own"] == 5
    assert everything["sample_data"] is False and everything["precision"] == "O0 fp32"
    assert everything["seconds"].keys() >= {"data", "model", "tokenize", "train", "evaluate", "predict", "save"}
    assert everything["peak_memory_bytes"] > 1e7


def test_history_is_in_state_and_table(own):
    state = results_of(own.args, "trainer_state.json")
    assert state["global_step"] == 4
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    assert [entry["step"] for entry in state["log_history"] if "eval_accuracy" in entry] == [2, 4]
    lines = own.text("train_loss.tsv").splitlines()
    assert lines[0] == "step\tloss\tlearning_rate" and len(lines) == 5
    assert float(lines[2].split("\t")[1]) == logged[1]["loss"]
    assert results_of(own.args)["train_loss"] == pytest.approx(np.mean([entry["loss"] for entry in logged]))


def test_run_json_tells_versions_data_and_weights(own):
    run = results_of(own.args, "run.json")
    assert run["packages"]["torch"] and run["packages"]["torch_npu"] is None
    assert run["weights_sha256"] == file_hash(own.folder / "model.safetensors")
    assert run["arguments"]["learning_rate"] == own.args.learning_rate
    assert set(run["data"]["sha256"]) == {"train", "validation", "test"}
    assert len(set(run["data"]["sha256"].values())) == 3
    assert run["argv"][-2:] == ["--seed", "42"]


def test_a_token_is_written_nowhere(own):
    for path in own.folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_the_data_hash_changes_with_one_label(own, model, tmp_path, capsys):
    flags = make_data(tmp_path / "data")
    path = Path(flags["train_file"])
    lines = path.read_text().splitlines()
    lines[1] = lines[1][: lines[1].rindex(",")] + ",yes"
    path.write_text("\n".join(lines) + "\n")
    other = finish(changed(own.args, output_dir=str(tmp_path / "out"), do_predict=False, token=None, **flags), capsys)
    before, after = (results_of(run.args, "run.json")["data"]["sha256"] for run in (own, other))
    assert before["train"] != after["train"] and before["validation"] == after["validation"]


def test_reports_open_no_network(own):
    page = own.text("report.html")
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page, re.IGNORECASE)
    assert not re.search(r"<(link|iframe)|@import", page, re.IGNORECASE) and "default-src 'none'" in page
    assert "color-scheme: light dark" in page and page.count("<svg") >= 4
    assert page.count("<tr>") > 20 and page.rstrip().endswith("</html>")


def test_reports_escape_what_they_show(tmp_path, capsys):
    model = make_model(tmp_path / "<script>alert(1)<")
    run = finish(arguments(tmp_path, model_name_or_path=str(model), max_steps=1), capsys)
    assert "<script>alert" not in run.text("report.html") and "<script>" not in run.text("README.md")


def test_predictions_of_own_data_are_label_names(own):
    lines = own.text("predict_results_own.txt").splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 6
    assert [line.split("\t")[0] for line in lines[1:]] == list("01234")
    assert {line.split("\t")[1] for line in lines[1:]} <= {"yes", "no"}


def test_written_predictions(tmp_path):
    outputs.write_predictions(tmp_path, get_task("mnli"), "-mm", np.array([2, 0]))
    assert (
        tmp_path / "predict_results_mnli-mm.txt"
    ).read_text() == "index\tprediction\n0\tcontradiction\n1\tentailment\n"
    outputs.write_predictions(tmp_path, get_task("stsb"), "", np.array([-0.2, 1.23456, 7.0], np.float32))
    values = [line.split("\t")[1] for line in (tmp_path / "predict_results_stsb.txt").read_text().splitlines()[1:]]
    assert values == ["0.000", "1.235", "5.000"]


def test_a_results_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "all_results.json"
    files.write_json(path, {"a": 1})
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            files.write_json(path, {"a": bad})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["all_results.json"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory, model) -> Finished:
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("sample")
    args = arguments(
        folder, sample=True, task_name="mnli", model_name_or_path=model, do_eval=True, do_predict=True, max_steps=2,
        max_train_samples=30, max_eval_samples=20, max_predict_samples=10,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as console:
        assert pipeline.run(args) == 0
    return Finished(args, console.getvalue())


def test_the_sample_is_called_what_it_is_everywhere(sample):
    assert SAMPLE_LABEL == "sample data, not GLUE"
    assert sample.console.count(SAMPLE_LABEL) >= 2  # where the data is named, and beside the results
    for name in ("all_results.json", "train_results.json", "eval_results.json", "predict_results.json"):
        assert results_of(sample.args, name)["sample_data"] is True, name
    assert results_of(sample.args, "run.json")["data"] == {
        "source": SAMPLE_LABEL, "sample_data": True, "sha256": results_of(sample.args, "run.json")["data"]["sha256"],
    }  # fmt: skip
    own_row = next(line for line in sample.text("README.md").splitlines() if "this run" in line)
    assert SAMPLE_LABEL in own_row and f'<span class="en" lang="en">{SAMPLE_LABEL}' in sample.text("report.html")


def test_own_data_is_not_called_a_sample(own):
    assert all(SAMPLE_LABEL not in own.text(name) for name in ("README.md", "report.html", "all_results.json"))


def test_mnli_has_both_scores_and_three_prediction_files(sample):
    results = results_of(sample.args)
    assert {"eval_accuracy", "eval_accuracy_mm", "eval_loss", "eval_loss_mm"} <= set(results)
    for name, labels in (
        ("mnli", get_task("mnli").labels),
        ("mnli-mm", get_task("mnli").labels),
        ("ax", get_task("ax").labels),
    ):
        lines = sample.text(f"predict_results_{name}.txt").splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == 11, name
        assert {line.split("\t")[1] for line in lines[1:]} <= set(labels)
    row = next(line for line in sample.text("README.md").splitlines() if "this run" in line)
    assert f"{100 * results['eval_accuracy']:.2f} / {100 * results['eval_accuracy_mm']:.2f}" in row


def test_published_figures_stand_beside(sample):
    card = sample.text("README.md")
    assert "86.46 / 86.09" in card and "207.809" in card  # Ascend NPU, one device


def test_the_console_shows_one_decoded_example(sample):
    lines = sample.console.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("example: "))
    assert "[CLS]" in lines[at + 1] and lines[at + 1].count("[SEP]") == 2
    assert lines[at + 2].strip().removeprefix("label: ") in get_task("mnli").labels


def test_the_model_card_has_recipe_and_hashes(own, sample):
    card = own.text("README.md")
    run = results_of(own.args, "run.json")
    assert "- `--learning_rate 0.005`" in card and "--output_dir" not in card and "--do_train" not in card
    assert f"- model.safetensors: `{run['weights_sha256']}`" in card
    assert f"- train: `{run['data']['sha256']['train']}`" in card
    assert "This model reads sentence1 and sentence2 and predicts one of: no, yes." in card
    assert "Standard error of this run's score" in card and "![Loss, score" in card
    assert "this model is a demonstration" in sample.text("README.md")


def test_the_hub_reads_the_scores_of_the_card(own, sample):
    from huggingface_hub import ModelCard

    data = ModelCard.load(sample.folder / "README.md").data
    assert (data.library_name, data.license, data.language) == ("transformers", "apache-2.0", "en")
    assert "sample-data" in data.tags and data.datasets is None
    found = {(result.dataset_split, result.metric_type): result.metric_value for result in data.eval_results}
    results = results_of(sample.args)
    assert found == {
        ("validation_matched", "accuracy"): results["eval_accuracy"],
        ("validation_mismatched", "accuracy"): results["eval_accuracy_mm"],
    }
    data = ModelCard.load(own.folder / "README.md").data
    assert data.license == "other" and data.language is None and data.base_model is None
    assert data.eval_results[0].metric_value == results_of(own.args)["eval_accuracy"]


def card_of(task, results: dict | None = None, **arguments) -> str:
    """A card, without a run."""
    data = SimpleNamespace(task=task, source="here")
    known = {
        "model_name_or_path": "google/bert", "sample_data": False, "device_name": "x", "precision": "O0",
        "batches": "packed", "world_size": 1, "seed": 1, "trained": "all", "max_seq_length": 128,
        f"eval_{task.headline}": 0.5,
    }  # fmt: skip
    return model_card(
        data, known | (results or {}), {"arguments": arguments, "weights_sha256": "0", "data": {"sha256": {}}}
    )


def test_a_card_of_glue_names_data_and_base_model():
    from huggingface_hub import ModelCard

    data = ModelCard(card_of(get_task("stsb"), {"eval_pearson": 0.6, "eval_spearmanr": 0.5})).data
    assert (data.base_model, data.datasets, data.language) == ("google/bert", ["nyu-mll/glue"], "en")
    assert data.metrics == ["pearsonr", "spearmanr"]
    result = data.eval_results[0]
    assert (result.dataset_type, result.dataset_config, result.metric_value) == ("nyu-mll/glue", "stsb", 0.6)


def test_a_base_model_passes_its_licence_and_language_on(tmp_path):
    from huggingface_hub import ModelCard

    base = tmp_path / "base"
    base.mkdir()
    own = own_task("own", ("text",), ("a", "b"))
    for front, licence, language in (
        ("license: mit\nlanguage: [de, fr]", "mit", ["de", "fr"]),
        ("license: [x]\nlanguage: {a: b}", "other", None),
        ("license: '<b>'", "other", None),
        (": : :", "other", None),
    ):
        (base / "README.md").write_text(f"---\n{front}\n---\ntext\n")
        data = ModelCard(card_of(own, {"model_name_or_path": str(base)})).data
        assert (data.license, data.language) == (licence, language)


MARKUP = [
    "<script>alert(1)</script>", "a\n---\nlicense: evil", "| x | y |", "`code`", "[x](http://localhost)", "*bold* _it_",
    "![p](x.png)", "www.a.b", "a@b.c", "$x$", "~~no~~", "{{ 7 * 7 }}", "{% if %}", "&amp;", "# head", "\\*",
]  # fmt: skip


@pytest.mark.parametrize("text", MARKUP)
def test_texts_of_the_card_are_no_markup(text):
    """Shown as they are by a Markdown reader: escaped, the text is the same."""
    import html

    from huggingface_hub import ModelCard

    task = own_task(text, (text,), (text, "b"))
    card = card_of(task, {"device_name": text, "precision": text, "seed": text}, max_seq_length=text)
    data = ModelCard(card).data
    assert data.license == "other" and re.fullmatch(r"[\w./-]+", data.tags[-1])
    body = card.split("\n---\n", 2)[-1]
    assert text not in body or not re.search(r"[<>|`*\[\]$~@{}\\]|://|www\.", text)
    assert " ".join(text.split()) in html.unescape(body)
    assert "&#38;#" not in card, "nothing is escaped twice"
    assert body.count("\n---") == 0 and re.findall(r"^# .*", body, re.M)[1:] == []


def test_the_curves_are_those_of_the_report(own, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *words, **more: drawn.append(self))
    history = results_of(own.args, "trainer_state.json")["log_history"]
    data = SimpleNamespace(task=get_task("wnli"), source="x")
    outputs.curves(own.folder / "x.png", history, 0.5, data)
    # The loss scale stands still and is not drawn; every panel has a line of at least two points.
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["Loss", "Score x100", "Learning rate"]
    assert all(len(line.get_xdata()) > 1 for axes in drawn[0].axes for line in axes.lines)
    outputs.curves(own.folder / "x.png", history[:1], None, data)
    assert drawn[1].axes == [] and "too few steps" in drawn[1].get_suptitle()


@pytest.mark.parametrize("is_activated", [True, False])
def test_the_next_command_starts_the_python_of_the_run(tmp_path, monkeypatch, is_activated):
    """As the README's reader has it: the launcher's .venv is not on the PATH of the shell."""
    (tmp_path / "python").symlink_to(sys.executable)  # another environment of the same python
    folder = Path(sys.executable).parent if is_activated else tmp_path
    monkeypatch.setattr(outputs.shutil, "which", lambda name: str(folder / name))
    assert outputs._python() == ("python" if is_activated else sys.executable)


def test_a_stopped_run_says_so_and_how_it_continues(sample):
    results = {**results_of(sample.args), keys.STOPPED_BY_SIGNAL: True}
    text = "\n".join(outputs.summary(results, sample.folder))
    assert "  stopped  by a signal, before the run was complete" in text and "bert_glue.predict" not in text
    assert "  next     the same command with --resume_from_checkpoint auto continues" in text
    del results[keys.TRAIN_STEPS]
    assert "  next     the same command starts it again" in outputs.summary(results, sample.folder)


def test_a_run_ends_with_lines_for_a_person(own, sample, monkeypatch):
    monkeypatch.setattr(outputs, "_python", lambda: "python")
    results = results_of(sample.args)
    lines = outputs.summary(results, Path("a folder"))
    assert lines[0] == f"***** results ***** ({SAMPLE_LABEL})" and len(lines) <= 12
    assert lines[1].startswith(
        f"  score    Accuracy {100 * results['eval_accuracy']:.2f} on 20 rows of validation_matched, "
    )
    assert lines[-5:] == [
        "  report   a folder/report.html",
        "  next     python -m bert_glue.predict --model 'a folder' --input FILE --output FILE",
        f"eval_accuracy_mm = {results['eval_accuracy_mm']:.4f}",
        f"eval_accuracy = {results['eval_accuracy']:.4f}",
        f"train_samples_per_second = {results['train_samples_per_second']:.4f}",
    ]
    monkeypatch.undo()
    assert all(line in sample.console for line in outputs.summary(results, sample.folder))
    assert "eval_loss =" not in sample.console
    assert f"  eval_accuracy = {results['eval_accuracy']}" in outputs.figures(results)
    assert not outputs.summary({"sample_data": False, "task_name": "rte", "e2e_runtime": 2.0}, Path("x"))[1:-2]


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize("name", TRAINABLE)
def test_a_harness_finds_each_metric_by_grep(sample, tmp_path: Path, name: str, is_alone: bool) -> None:
    """As the scripts of ModelZoo do it, in one log or in those of all ranks."""
    task = get_task(name)
    results = {**results_of(sample.args), "task_name": name, "train_samples_per_second": 203.5}
    results = {key: value for key, value in results.items() if key not in ("eval_accuracy", "eval_accuracy_mm")}
    values = {f"eval_{metric}": 0.9 - 0.1 * at for at, metric in enumerate(task.metrics)}
    results |= values | {f"{key}_standard_error": 0.0111 for key in values} | {f"{key}_mm": 0.2 for key in values}
    text = "".join(f"step=7 {key}=0.5\n" for key in values) + "\n".join(outputs.summary(results, tmp_path))
    (tmp_path / "train_0.log").write_text(text)
    if not is_alone:
        (tmp_path / "train_rank_1.log").write_text("note: of another rank\n")
    for key, value in {**values, "train_samples_per_second =": 203.5}.items():
        command = f"""grep "{key}" train_*.log | awk 'END{{print $3}}'"""
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert float(done.stdout) == pytest.approx(value), (key, done.stdout)
    undefined = outputs.summary({**results, f"eval_{task.headline}": None}, tmp_path)
    assert f"eval_{task.headline} = null" in undefined


def test_a_run_that_learned_nothing_says_so(own):
    results = results_of(own.args) | {"eval_collapsed": "all 13 predictions are no"}
    assert "  warning  the model learned nothing: all 13 predictions are no" in outputs.summary(results, own.folder)
