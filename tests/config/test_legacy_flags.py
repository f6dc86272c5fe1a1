"""Every command line that ran with the reference or with Hugging Face's script has an answer here."""

from __future__ import annotations

import pytest

from bert_glue.config.arguments import FLAGS
from bert_glue.config.legacy import LEGACY_FLAGS, LEGACY_VALUES
from bert_glue.config.parser import parse
from bert_glue.errors import UsageError

BASE = ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "out", "--do_train"]

# TrainingArguments of 4.18 that 5.x no longer has, and fields that came and went in between.
GONE = """
overwrite_output_dir evaluation_strategy per_gpu_train_batch_size per_gpu_eval_batch_size warmup_ratio
logging_dir no_cuda fp16_opt_level half_precision_backend fp16_backend xpu_backend tpu_num_cores
tpu_metrics_debug past_index sharded_ddp adafactor group_by_length use_legacy_prediction_loop mp_parameters
push_to_hub_model_id push_to_hub_organization push_to_hub_token local_rank include_inputs_for_metrics
torchdynamo ray_scope jit_mode_eval use_ipex fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap
use_mps_device save_safetensors dispatch_batches split_batches include_tokens_per_second
"""
# ModelArguments and DataTrainingArguments of the text-classification example, all versions.
SCRIPT = """
model_name_or_path config_name tokenizer_name cache_dir use_fast_tokenizer model_revision token
use_auth_token trust_remote_code ignore_mismatched_sizes task_name dataset_name dataset_config_name
max_seq_length overwrite_cache pad_to_max_length max_train_samples max_eval_samples max_predict_samples
train_file validation_file test_file max_val_samples max_test_samples data_dir
"""
REFERENCE = """
device device_id fp16_opt_level loss_scale use_combine_grad skip_steps distributed_process_group_timeout
data_path half_precision_backend local_rank
"""

ONE_DEVICE = (
    "--model_name_or_path ./bert-large-cased --task_name mrpc --do_train --do_eval --max_seq_length 128 "
    "--per_device_train_batch_size 32 --learning_rate 2e-5 --num_train_epochs 5 --device 0 --fp16 "
    "--fp16_opt_level O2 --dataloader_drop_last --loss_scale 1024.0 --optim adamw_apex_fused_npu "
    "--use_combine_grad --overwrite_output_dir --output_dir X"
)
EIGHT_DEVICES = ONE_DEVICE.replace(" --device 0", "") + " --save_steps 50000 --skip_steps 5 --local_rank=0"
README = (
    "--model_name_or_path google-bert/bert-base-cased --task_name mrpc --do_train --do_eval "
    "--max_seq_length 128 --per_device_train_batch_size 32 --learning_rate 2e-5 --num_train_epochs 3 "
    "--output_dir /tmp/mrpc/"
)
README_HUB = README.replace("--task_name mrpc", "--dataset_name imdb").replace("--do_eval", "--do_predict")
README_FILES = README.replace("--task_name mrpc", "--train_file train.csv --validation_file dev.csv")


def answer(name: str) -> str:
    """Which of the four answers a flag gets."""
    if name in FLAGS:
        return "flag"
    legacy = LEGACY_FLAGS.get(name)
    if legacy is None:
        return "none"
    return "refused" if legacy.refused else "renamed" if legacy.flag else "without effect"


@pytest.mark.parametrize("line", [ONE_DEVICE, EIGHT_DEVICES, README, README + " --fp16", README_HUB, README_FILES])
def test_published_command_lines_run_unchanged(line):
    args = parse(line.split())
    assert (args.max_seq_length, args.per_device_train_batch_size, args.learning_rate) == (128, 32, 2e-5)


def test_reference_launcher_means_what_it_says():
    args = parse(EIGHT_DEVICES.split())
    assert args.fp16 and args.use_combine_grad and args.dataloader_drop_last
    assert (args.fp16_opt_level, args.loss_scale, args.optim) == ("O2", "1024.0", "adamw_apex_fused_npu")
    assert (args.skip_steps, args.save_steps, parse(ONE_DEVICE.split()).device) == (5, 50000, "0")
    assert [notice.split()[0] for notice in args.notices] == ["--overwrite_output_dir", "--local_rank"]


def test_every_installed_training_argument_has_an_answer():
    import dataclasses

    from transformers import TrainingArguments

    names = [found.name for found in dataclasses.fields(TrainingArguments)]
    assert len(names) > 100
    assert [name for name in names if answer(name) == "none"] == []


@pytest.mark.parametrize("name", (GONE + SCRIPT + REFERENCE).split())
def test_every_older_argument_has_an_answer(name):
    assert answer(name) != "none"


def test_answers_point_at_flags_that_exist():
    for name, legacy in LEGACY_FLAGS.items():
        assert legacy.flag is None or legacy.flag in FLAGS, name
        assert legacy.reason or legacy.flag, name
        assert "\n" not in legacy.reason, name
    for (name, old), new in LEGACY_VALUES.items():
        assert new in FLAGS[name].choices and old not in FLAGS[name].choices


@pytest.mark.parametrize(
    ("words", "field", "value", "notices"),
    [
        ("--evaluation_strategy epoch", "eval_strategy", "epoch", 1),
        ("--per_gpu_train_batch_size 16", "per_device_train_batch_size", 16, 1),
        ("--per_gpu_eval_batch_size=16", "per_device_eval_batch_size", 16, 1),
        ("--no_cuda", "use_cpu", True, 1),
        ("--no_cuda false", "use_cpu", False, 1),
        ("--warmup_ratio 0.1", "warmup_steps", 0.1, 1),
        ("--warmup_steps 100 --warmup_ratio 0.0", "warmup_steps", 100.0, 1),
        ("--group_by_length", "train_sampling_strategy", "group_by_length", 1),
        ("--group_by_length False", "train_sampling_strategy", "random", 1),
        ("--adafactor", "optim", "adafactor", 1),
        ("--use_auth_token", "token", None, 1),
        ("--use_auth_token hf_x", "token", "hf_x", 1),
        ("--fp16_backend amp", "amp_backend", "native", 1),
        ("--half_precision_backend apex", "amp_backend", "apex", 2),
        ("--device_id 3", "device", "3", 1),
        ("--distributed_process_group_timeout 60", "ddp_timeout", 60, 1),
        ("--max_val_samples 7", "max_eval_samples", 7, 1),
        ("--activation_checkpointing", "gradient_checkpointing", True, 1),
        ("--log_level passive", "log_level", "info", 0),
        ("--logging_dir runs --seed 3", "seed", 3, 1),
        ("--label_names a b c --seed 3", "seed", 3, 1),
        ("--no_remove_unused_columns --seed 3", "seed", 3, 1),
        ("--push_to_hub false", "push_to_hub", False, 0),
        ("--hub_strategy every_save", "seed", 42, 1),
        ("--past_index -1 --eval_delay 0 --sharded_ddp=", "seed", 42, 3),
    ],
)
def test_renamed_and_ineffective_flags(words, field, value, notices):
    args = parse([*BASE, *words.split()])
    assert getattr(args, field) == value
    assert len(args.notices) == notices
    assert all("\n" not in notice and notice.startswith("--") for notice in args.notices)


def test_notice_does_not_show_a_token():
    assert "hf_x" not in " ".join(parse([*BASE, "--use_auth_token", "hf_x"]).notices)


@pytest.mark.parametrize(
    "words",
    [
        "--sharded_ddp simple",
        "--tpu_num_cores 8",
        "--xpu_backend ccl",
        "--past_index 2",
        "--mp_parameters x",
        "--use_legacy_prediction_loop",
        "--fsdp full_shard auto_wrap",
        "--deepspeed config.json",
        "--push_to_hub_organization x",
        "--hub_revision x",
        "--torchdynamo inductor",
        "--neftune_noise_alpha 5",
    ],
)
def test_refusals_give_one_line_with_the_reason(words):
    with pytest.raises(UsageError) as caught:
        parse([*BASE, *words.split()])
    (line,) = str(caught.value).splitlines()
    flag = words.split()[0]
    assert line == f"{flag}: refused: {LEGACY_FLAGS[flag[2:]].reason}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--warmup_ratio 1.5", "--warmup_ratio: 1.5 is not a fraction of all steps; accepted: [0, 1)"),
        ("--fp16_backend amq", "--fp16_backend: unknown value 'amq'. Did you mean amp?"),
        ("--evaluation_strategy", "--evaluation_strategy needs a value"),
        ("--evaluation_strategy often", "--evaluation_strategy: unknown value 'often'"),
    ],
)
def test_wrong_values_name_the_flag_that_was_typed(words, expected):
    with pytest.raises(UsageError) as caught:
        parse([*BASE, *words.split()])
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_the_slow_tokenizer_is_refused_not_ignored():
    words = f"{README} --use_fast_tokenizer"
    with pytest.raises(UsageError, match="use_fast_tokenizer False: transformers 5 has only one tokenizer"):
        parse([*words.split(), "False"])
    assert parse([*words.split(), "True"]).use_fast_tokenizer


# run_classification.py of transformers' text-classification example: its README's lines and every field of its classes.
CLASSIFICATION = (
    "--model_name_or_path google-bert/bert-base-uncased --dataset_name amazon_reviews_multi --dataset_config_name en "
    "--shuffle_train_dataset --metric_name accuracy --text_column_name review_title,review_body,product_category "
    "--text_column_delimiter \\n --label_column_name stars --do_train --do_eval --max_seq_length 512 "
    "--per_device_train_batch_size 32 --learning_rate 2e-5 --num_train_epochs 1 --output_dir /tmp/reviews"
)
MULTI_LABEL = (
    "--model_name_or_path google-bert/bert-base-uncased --dataset_name reuters21578 --dataset_config_name ModApte "
    "--shuffle_train_dataset --remove_splits unused --metric_name f1 --text_column_name text "
    "--label_column_name topics --do_train --do_eval --max_seq_length 512 --per_device_train_batch_size 32 "
    "--learning_rate 2e-5 --num_train_epochs 15 --output_dir /tmp/reuters"
)
CLASSIFICATION_FIELDS = """
dataset_name dataset_config_name do_regression text_column_names text_column_delimiter train_split_name
validation_split_name test_split_name remove_splits remove_columns label_column_name max_seq_length overwrite_cache
pad_to_max_length shuffle_train_dataset shuffle_seed max_train_samples max_eval_samples max_predict_samples metric_name
train_file validation_file test_file
"""


@pytest.mark.parametrize(
    ("line", "columns"),
    [
        (CLASSIFICATION, ("review_title,review_body,product_category", "stars")),
        (MULTI_LABEL, ("text", "topics")),
        (f"{MULTI_LABEL} --text_column_names body --train_split_name all --remove_columns date", ("body", "topics")),
    ],
)
def test_the_lines_of_run_classification_are_accepted(line, columns):
    args = parse(line.split())
    assert (args.text_column_names, args.label_column_name) == columns and args.shuffle_train_dataset
    assert args.metric_name in ("accuracy", "f1")


def test_every_field_of_run_classification_has_an_answer():
    assert [name for name in CLASSIFICATION_FIELDS.split() if answer(name) in ("none", "refused")] == []
