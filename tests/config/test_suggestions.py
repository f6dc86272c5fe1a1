"""A suggested flag means what was typed, or there is none."""

import pytest

from bert_glue.config import suggestions
from bert_glue.config.arguments import FLAGS
from bert_glue.config.legacy import LEGACY_FLAGS
from bert_glue.config.parser import parse
from bert_glue.config.suggestions import suggested_flag
from bert_glue.errors import UsageError


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("learning_rate", "lr base_lr peak_lr Learning-Rate learningrate lerning_rate learn leraning_rate"),
        ("num_train_epochs", "epochs n_epochs num_epochs epohcs num_train_epoch"),
        ("per_device_train_batch_size", "batch_size bs batchsize bathc_size train_batch_size"),
        ("per_device_eval_batch_size", "eval_batch_size test_batch_size val_batch_size"),
        ("model_name_or_path", "model model_name pretrained_model_name_or_path model_name_or_pth"),
        ("task_name", "task taskname task_nmae"),
        ("max_seq_length", "max_len max_length seq_len maxlen max_seq_lenght"),
        ("weight_decay", "wd weight_decya weight-decay"),
        ("warmup_steps", "warmup num_warmup_steps warmup_step"),
        ("gradient_accumulation_steps", "accum grad_accum accumulation_steps gradient_acumulation_steps"),
        ("output_dir", "out outdir save_dir outptu_dir"),
        ("seed", "sed seeds random_seed"),
        ("max_grad_norm", "clip grad_clip gradient_clip_val"),
        ("do_predict", "test predict do_test do_perdict"),
        ("overwrite_output_dir", "overwrite_output overwrite_output_dri"),
        ("text_column_names", "text_col text_columns text_colum_names"),
        ("validation_split_percentage", "val_split validation_split_percent"),
        ("help", "hlep"),
    ],
)
def test_names_that_mean_a_flag(flag, names):
    assert {name: suggested_flag(name) for name in names.split()} == dict.fromkeys(names.split(), flag)


@pytest.mark.parametrize(
    "names",
    [
        "use_lazy_mode lazy streaming mode verbose",  # of other tools, nothing here
        "test_size text_file text_files train_size",  # near in letters, other things
        "fp32 bf8 adam_beta3 fp8 fp16_opt_levels2",  # digits are no slips
        "loss loss_fn focal_loss weight weights hidden hidden_size distributed",  # beginnings of other things
        "use_flash_attention num_layers gamma pooling temperature dtype no_eval x",
        "save load adam max -",  # could be several
        "lr" * 500,
    ],
)
def test_names_that_mean_no_flag(names):
    assert {name: suggested_flag(name) for name in names.split()} == dict.fromkeys(names.split(), "")


def test_the_table_says_each_name_once_and_of_flags_that_are_there():
    words = [word for line in suggestions._MEANINGS.values() for word in line.split()]
    assert len(words) == len(set(words))
    assert not set(words) & {*FLAGS, *LEGACY_FLAGS} and set(suggestions._MEANINGS) <= set(FLAGS)


def test_refused_flags_are_not_suggested():
    refused = [name for name, legacy in LEGACY_FLAGS.items() if legacy.refused]
    assert not [name for name in refused if len(name) > 5 and suggested_flag(name[:-1]) == name]


@pytest.mark.parametrize(("typed", "code"), [("--lr", "Did you mean --learning_rate?"), ("--use_lazy_mode", "--help")])
def test_the_command_line_shows_it(typed, code):
    with pytest.raises(UsageError, match=f"{typed}: unknown flag. {code.replace('?', '.')}"):
        parse([typed, "1", "--model_name_or_path", "m", "--task_name", "rte", "--do_train", "--output_dir", "o"])
