"""LoRA and the frozen encoder: what peft computes, on the packed path; what is trained, saved and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_reference import _assert_same_gradients, _backward
from safetensors.torch import load_file
from tiny_models import SETTINGS, random_batch, stock_model, takes_types, write_model
from tiny_run import REPOSITORY, arguments, bert_tensors, changed, fit, flags_of, losses, make_model, results_of

from bert_glue.config.arguments import Arguments
from bert_glue.config.parser import parse
from bert_glue.errors import CheckpointError, MachineError, UsageError
from bert_glue.model.adapters import _targets
from bert_glue.model.families import FAMILIES
from bert_glue.model.loading import load_model
from bert_glue.pipeline import run as pipeline_run
from bert_glue.tasks import get_task
from bert_glue.training.resume import whole_weights

RTE = get_task("rte")


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def lora(folder: Path, **changes) -> Arguments:
    return Arguments(model_name_or_path=str(folder), do_train=True, **{"lora_rank": 3, **changes})


def loaded(args: Arguments):
    """The model with adapters that do something: they start as nothing."""
    model = load_model(args, RTE)
    torch.manual_seed(1)
    for parameter in model.module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.module.eval() and model


def adapter_of(peft, stock, model, folder: Path):
    """`stock` with the adapter as it was saved, by peft alone."""
    folder.mkdir()
    model.adapter.save(folder, model.tensors())
    return peft.PeftModel.from_pretrained(stock, str(folder), is_trainable=True).eval()


def peft_gradients(theirs) -> dict[str, torch.Tensor]:
    found = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    return {n.replace(".modules_to_save", "").removeprefix("base_model.model."): g for n, g in found.items()}


def our_gradients(model) -> dict[str, torch.Tensor]:
    """Of what is trained, under peft's names."""
    gradients = {n: p.grad for n, p in model.module.named_parameters() if p.requires_grad}
    values = {n: p.detach() for n, p in model.module.named_parameters()}
    marked = {n: torch.zeros_like(v) for n, v in values.items()} | gradients
    return {n: g for n, g in model.tensors(marked).items() if ".lora_" in n or _is_head(n)}


def _is_head(name: str) -> bool:
    return "pooler" in name or name.startswith(("classifier", "pre_classifier", "head."))


# ---- exactness ----


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("model_type", SETTINGS)
def test_packed_adapters_compute_what_peft_does(peft, tmp_path, model_type, targets):
    """Logits, gradients and the merged model, each against peft's own padded run of the saved adapter."""
    from transformers import AutoModelForSequenceClassification

    stock = write_model(tmp_path / "base", model_type)
    model = loaded(lora(tmp_path / "base", lora_target_modules=targets))
    assert model.is_packed
    theirs = adapter_of(peft, stock, model, tmp_path / "adapter")
    uses_types = takes_types(model_type)
    packed, padded = random_batch((37, 1, 2, 20, 3, 64), stock.config.vocab_size, uses_types)
    padded = {n: v for n, v in padded.items() if n != "token_type_ids" or uses_types}
    ours, expected = model.module(**packed), theirs(**padded).logits
    assert (ours - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    with torch.no_grad(), theirs.disable_adapter():
        assert (ours - theirs(**padded).logits).abs().max() > 1e-2  # the adapters matter
    _backward(ours)
    _backward(expected)
    _assert_same_gradients(our_gradients(model), peft_gradients(theirs))
    model.save(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (merged(**padded).logits - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
    assert set(load_file(tmp_path / "merged/model.safetensors")) == set(load_model(_plain(tmp_path), RTE).tensors())


def _plain(tmp_path: Path) -> Arguments:
    return Arguments(model_name_or_path=str(tmp_path / "base"))


@pytest.mark.parametrize("targets", ["key", "query,key", "value", "attention.output.dense,intermediate.dense"])
def test_any_choice_of_layers(peft, tmp_path, targets):
    """Where not all of query, key and value are adapted, the joint product adds to those alone."""
    stock = write_model(tmp_path / "base")
    model = loaded(lora(tmp_path / "base", lora_target_modules=targets, lora_alpha=5.0))
    theirs = adapter_of(peft, stock, model, tmp_path / "adapter")
    packed, padded = random_batch((9, 4, 30), stock.config.vocab_size)
    assert (model.module(**packed) - theirs(**padded).logits).abs().max() <= 1e-5
    assert set(json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]) == set(
        targets.split(",")
    )


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2"])
def test_a_padded_run_has_the_same_adapters(peft, tmp_path, model_type):
    """peft's own layers in transformers' model; DeBERTa cannot be packed."""
    stock = write_model(tmp_path / "base", model_type)
    model = loaded(lora(tmp_path / "base", padding="longest"))
    assert not model.is_packed
    theirs = adapter_of(peft, stock, model, tmp_path / "adapter")
    _, padded = random_batch((9, 4, 30), stock.config.vocab_size, pairs=False)
    ours, expected = model.module(**padded), theirs(**padded).logits
    assert (ours - expected).abs().max() <= 1e-5
    model.save(tmp_path / "merged")
    again = load_model(Arguments(model_name_or_path=str(tmp_path / "merged"), padding="longest"), RTE)
    assert not again.fresh and (again.module.eval()(**padded) - expected).abs().max() <= 1e-5


def test_defaults_and_start_are_those_of_peft(peft, tmp_path):
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    write_model(tmp_path / "base")
    model = load_model(lora(tmp_path / "base"), RTE)
    assert model.adapter.scaling == 2.0
    for model_type in set(FAMILIES) & set(DEFAULTS):
        model.config["model_type"] = model_type
        assert list(_targets(lora(tmp_path), model, None, [])) == DEFAULTS[model_type]
    low_rank = model.module.layers[0].qkv.low_rank
    assert not low_rank.up.any()
    theirs = peft.get_peft_model(stock_model("bert"), peft.LoraConfig(r=3, task_type="SEQ_CLS"))
    start = theirs.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A["default"].weight
    for piece in low_rank.down.chunk(2):  # uniform on the same interval
        assert piece.abs().max() <= start.abs().max() * 1.2
        assert piece.std().item() == pytest.approx(start.std().item(), rel=0.3)


def test_dropout_before_the_adapters(peft, tmp_path):
    """Its mean over masks is the function without it, each mask another, the same address the same mask."""
    from bert_glue.model.layers import DropoutMasks

    stock = write_model(tmp_path / "base")
    model = loaded(lora(tmp_path / "base", lora_dropout=0.5))
    packed, _ = random_batch((9, 4, 30), stock.config.vocab_size)
    layer, x = model.module.layers[0], torch.randn(43, 32)
    dropout_masks, outputs = DropoutMasks(0), []
    for step in range(400):
        dropout_masks.begin(step)
        outputs.append(layer.qkv(x, dropout_masks, 7).detach())
    exact = layer.qkv(x)
    dropout_masks.begin(3)
    assert torch.equal(layer.qkv(x, dropout_masks, 7), outputs[3]) and not torch.equal(outputs[3], outputs[4])
    spread = torch.stack(outputs).std(0).max()
    assert (torch.stack(outputs).mean(0) - exact).abs().max() < 5 * spread / 20
    assert torch.equal(layer.qkv(x, dropout_masks, 7)[:, 32:64], exact[:, 32:64])  # the key is not adapted
    assert not torch.equal(model.module(**packed), model.module(**packed, dropout_masks=dropout_masks))


# ---- what is trained and what is saved ----

LEVELS = [{}, {"bf16": True, "fp16_opt_level": "O1"}, {"bf16": True, "fp16_opt_level": "O2"}]


@pytest.mark.parametrize("level", LEVELS, ids=["O0", "O1 bf16", "O2 bf16"])
@pytest.mark.parametrize("mode", [{"lora_rank": 4}, {"freeze_encoder": True}], ids=["lora", "frozen"])
def test_only_head_and_adapters_are_trained(peft, tmp_path, level, mode):
    run = fit(arguments(tmp_path, weight_decay=0.1, num_train_epochs=6.0, **mode, **level))
    trained = [name for name, p in run.learner.model.module.named_parameters() if p.requires_grad]
    assert all(name.startswith("head_") or ".low_rank." in name for name in trained)
    assert any(".low_rank." in name for name in trained) == ("lora_rank" in mode)
    # Nothing is kept for the rest: no gradients, no moments, no masters, no narrowed table.
    assert all(p.grad is None for p in run.learner.model.module.parameters() if not p.requires_grad)
    size = sum(p.numel() for p in run.learner.model.module.parameters() if p.requires_grad)
    assert sum(m.numel() for m in run.learner.precision.masters) == size and run.learner.narrowed is None
    assert sum(s["exp_avg"].numel() for s in run.learner.optimizer.state.values()) == size
    assert losses(run)[-1] < losses(run)[0]
    # What is saved of the encoder are the base model's own bits, whatever level it ran at.
    tensors, base = whole_weights(run), bert_tensors()
    same = [name for name in base if torch.equal(tensors[name], torch.from_numpy(base[name]))]
    assert set(base) - set(same) <= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    if "lora_rank" in mode:
        merged = run.learner.model.adapter.merged(tensors)
        moved = {n for n in base if "pooler" not in n and not torch.equal(merged[n], torch.from_numpy(base[n]))}
        assert moved == {
            f"bert.encoder.layer.{n}.attention.self.{w}.weight" for n in (0, 1) for w in ("query", "value")
        }


@pytest.mark.parametrize("level", LEVELS[::2], ids=["O0", "O2 bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_is_the_same_run(peft, tmp_path, level, checkpointing):
    settings = {
        "lora_rank": 4, "lora_dropout": 0.2, "lora_target_modules": "all-linear", "save_strategy": "steps",
        "save_steps": 3, "gradient_accumulation_steps": 2, "gradient_checkpointing": checkpointing, **level,
    }  # fmt: skip
    whole = fit(arguments(tmp_path, **settings))
    again = fit(changed(whole.args, resume_from_checkpoint=str(tmp_path / "out/checkpoint-3")))
    assert losses(again) == losses(whole) and again.progress.step == whole.progress.step == 4
    theirs = whole_weights(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in whole_weights(again).items())


def test_gradient_checkpointing_changes_nothing(peft, tmp_path):
    args = arguments(tmp_path, lora_rank=4, lora_dropout=0.3, hidden_dropout_prob=0.1)
    plain, less = fit(args), fit(changed(args, gradient_checkpointing=True))
    assert losses(plain) == pytest.approx(losses(less), rel=1e-5)


def test_another_base_model_or_another_adapter_is_refused(peft, tmp_path):
    args = arguments(tmp_path, lora_rank=4, save_strategy="steps", save_steps=2)
    fit(args)
    back = changed(args, resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    other = {"bert.encoder.layer.0.output.dense.bias": torch.ones(16).numpy()}
    make_model(tmp_path / "other", changes=other)
    cases = [
        ({"model_name_or_path": str(tmp_path / "other")}, "weights that are not trained"),
        ({"lora_rank": 5}, "model"),
        ({"lora_alpha": 3.0}, "--lora_alpha (8.0, now 3.0)"),
        ({"lora_target_modules": "query,key"}, "adapted layers"),
        ({"lora_rank": None}, "model"),
    ]
    for changes, says in cases:
        with pytest.raises(CheckpointError, match="made with another") as refused:
            fit(changed(back, **changes))
        assert says in str(refused.value)
    fit(back)


def test_the_backward_pass_of_a_frozen_encoder_ends_at_the_head(tmp_path):
    model = load_model(arguments(tmp_path, freeze_encoder=True), RTE)
    seen = []
    model.module.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    packed, _ = random_batch((9, 4), 30)
    logits = model.module.train()(**packed)
    assert seen == [False] and logits.requires_grad and model.passes == 1
    assert model.trained.startswith("the head; ")


def test_the_folder_of_a_run_works_everywhere(peft, tmp_path, capsys):
    """All results, both forms of the model, the pipeline, evaluation, prediction, a repeat."""
    from transformers import AutoModelForSequenceClassification, pipeline

    args = arguments(
        tmp_path, lora_rank=4, do_eval=True, do_predict=True, num_train_epochs=3.0, bf16=True, fp16_opt_level="O2"
    )
    assert pipeline_run.run(args) == 0
    out, results = tmp_path / "out", results_of(args)
    assert "LoRA of rank 4 on 4 layers (query, value)" in results["trained"]
    assert sorted(p.name for p in (out / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert config["base_model_name_or_path"] == args.model_name_or_path
    text = {"text": "a dog runs", "text_pair": "a dog sleeps"}
    classify = pipeline("text-classification", model=str(out))
    base = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, num_labels=2)
    adapted = peft.PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload().eval()
    tokens = classify.tokenizer(text["text"], text["text_pair"], return_tensors="pt")
    with torch.no_grad():
        shares = adapted(**tokens).logits.softmax(-1)[0]
    told = {entry["label"]: entry["score"] for entry in classify(text, top_k=None)}
    assert [told["no"], told["yes"]] == pytest.approx(shares.tolist(), abs=1e-6)
    again = changed(
        args, do_train=False, lora_rank=None, bf16=False, fp16_opt_level="O1", model_name_or_path=str(out),
        output_dir=str(tmp_path / "eval"),
    )  # fmt: skip
    assert pipeline_run.run(again) == 0
    assert results_of(again)["eval_accuracy"] == pytest.approx(results["eval_accuracy"], abs=0.08)
    with pytest.raises(MachineError, match="holds only adapters"):
        load_model(Arguments(model_name_or_path=str(out / "adapter")), RTE)
    # A later run of all weights deletes nothing, and says what it found.
    assert pipeline_run.run(changed(args, lora_rank=None)) == 0
    assert "adapter: of an earlier run" in capsys.readouterr().out and (out / "adapter").exists()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora_rank", "0"], "accepted: [1, inf)"),
        (["--lora_alpha", "4"], "--lora_alpha needs --lora_rank"),
        (["--lora_target_modules", "query"], "--lora_target_modules needs --lora_rank"),
        (["--lora_rank", "4", "--freeze_encoder"], "give only one"),
    ],
)
def test_flags_that_do_not_go_together(flags, says):
    with pytest.raises(UsageError) as refused:
        parse(["--task_name", "rte", "--sample", "--output_dir", "out", "--do_train", *flags])
    assert says in str(refused.value)
    with pytest.raises(UsageError, match="--lora_rank needs --do_train"):
        parse(["--task_name", "rte", "--sample", "--output_dir", "out", "--do_eval", "--lora_rank", "4"])


@pytest.mark.parametrize("targets", ["dense", "nonsense", "query,nonsense", "classifier"])
def test_layers_that_are_not_the_encoder_s(peft, tmp_path, targets):
    """`dense` is the pooler's name too, which is trained whole."""
    write_model(tmp_path)
    with pytest.raises(UsageError, match="Choices: all-linear, or some of attention.output.dense, attention.self.key"):
        load_model(lora(tmp_path, lora_target_modules=targets), RTE)


def test_without_peft_one_line_and_the_way_to_get_it(tmp_path):
    args = arguments(tmp_path, lora_rank=4)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/peft.py").write_text("raise ImportError('No module named peft')")
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "run_glue.py"), *flags_of(args)], cwd=tmp_path, timeout=120,
        env={"PYTHONPATH": str(tmp_path / "hidden"), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("--lora_rank: peft cannot be imported (No module named peft)")


def test_absent_peft_is_named_with_its_install(tmp_path, monkeypatch):
    monkeypatch.setattr("bert_glue.model.adapters.find_spec", lambda name: None)
    write_model(tmp_path)
    with pytest.raises(MachineError, match="pip install peft"):
        load_model(lora(tmp_path), RTE)
