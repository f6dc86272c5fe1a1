"""Finds the flag that an unknown name means: by a table of other tools' names, by its beginning, or as a typing error.

A flag is suggested only if it means the same. Similar letters alone would suggest `--save_only_model` for
`--use_lazy_mode`. The flags of `run_glue.py` and those of every other command are found in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import zip_longest

from bert_glue.config.arguments import FLAGS
from bert_glue.config.legacy import LEGACY_FLAGS

OWN_SWITCHES = ("help", "print_config", "version")

# Flag here -> names for the same thing in other tools and older scripts.
_MEANINGS = {
    "model_name_or_path": "model model_name model_path model_id model_dir base_model bert_model pretrained_model"
    " pretrained_model_name pretrained_model_path pretrained_model_name_or_path init_checkpoint encoder",
    "config_name": "model_config config_path bert_config_file",
    "tokenizer_name": "tokenizer tokenizer_path tokenizer_dir tokenizer_name_or_path vocab vocab_file",
    "cache_dir": "cache cache_path cache_folder hf_cache hf_home",
    "model_revision": "revision branch",
    "token": "hf_token api_token api_key access_token",
    "trust_remote_code": "remote_code allow_remote_code",
    "hidden_dropout_prob": "dropout dropout_prob dropout_rate dropout_p hidden_dropout hidden_dropout_rate",
    "attention_probs_dropout_prob": "attention_dropout attention_dropout_prob attn_dropout attn_pdrop",
    "freeze_encoder": "freeze freeze_bert freeze_base freeze_backbone freeze_base_model linear_probe",
    "lora_rank": "lora_r lora_dim use_lora lora peft",
    "lora_target_modules": "target_modules lora_targets lora_modules",
    "task_name": "task tasks glue_task",
    "data_path": "data data_folder data_root dataset_dir dataset_path glue_dir glue_path glue_data",
    "sample": "sample_data demo dummy_data fake_data",
    "dataset_name": "dataset hf_dataset",
    "dataset_config_name": "dataset_config subset",
    "train_file": "train_data train_path train_csv train_set train_data_file training_file training_data",
    "validation_file": "eval_file dev_file val_file valid_file eval_data dev_data val_data validation_data dev_set"
    " eval_data_file validation_path",
    "test_file": "test_data test_path test_csv test_set test_data_file predict_file prediction_file predict_data",
    "text_column_names": "text_columns text_col text_cols text_field text_key sentence_column input_column",
    "label_column_name": "label_col label_field label_key target target_column target_col",
    "validation_split_percentage": "validation_split val_split dev_split valid_split eval_split_percentage val_ratio"
    " validation_size val_size dev_size dev_ratio",
    "label_map": "label2id id2label label_mapping",
    "max_seq_length": "max_len max_length max_seq_len seq_len seq_length sequence_length max_sequence_length max_tokens"
    " max_token_length model_max_length",
    "doc_stride": "stride document_stride window_stride sliding_window overlap window_overlap",
    "max_windows": "max_chunks num_windows n_windows",
    "max_train_samples": "num_train_samples train_samples max_train_examples limit_train n_train",
    "max_eval_samples": "num_eval_samples eval_samples max_eval_examples limit_eval max_dev_samples",
    "max_predict_samples": "predict_samples max_test_examples max_predict_examples",
    "preprocessing_num_workers": "num_proc tokenizer_workers",
    "num_cpu_threads_per_process": "threads num_threads cpu_threads omp_num_threads torch_threads",
    "dataloader_num_workers": "num_workers workers n_workers",
    "do_train": "train train_model do_training do_finetune fine_tune finetune",
    "do_eval": "eval evaluate do_evaluate do_evaluation do_valid do_validation do_dev eval_only validate",
    "do_predict": "predict test do_test do_predictions do_pred do_inference inference infer",
    "output_dir": "output out outdir out_dir output_path output_folder output_directory save_dir save_path save_folder"
    " result_dir results_dir work_dir checkpoint_dir",
    "seed": "random_seed rng_seed random_state manual_seed torch_seed",
    "resume_from_checkpoint": "resume resume_from resume_training resume_checkpoint continue_training continue_from",
    "report_to": "tracker trackers logger loggers use_wandb wandb use_tensorboard tensorboard",
    "run_name": "experiment_name exp_name wandb_name wandb_run_name",
    "disable_tqdm": "no_tqdm no_progress no_progress_bar disable_progress_bar quiet",
    "logging_steps": "log_steps log_every log_every_n_steps log_interval log_freq logging_interval print_every"
    " print_freq report_every",
    "per_device_train_batch_size": "batch batch_size bs bsz train_batch_size train_bs train_batch micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size eval_bs eval_batch val_batch_size valid_batch_size test_batch_size"
    " validation_batch_size predict_batch_size dev_batch_size",
    "gradient_accumulation_steps": "accum accumulate accumulation accum_steps accum_iter accumulation_steps grad_acc"
    " grad_accum grad_acc_steps grad_accum_steps grad_accumulation grad_accumulation_steps gradient_accumulation"
    " gradient_accumulate_steps accumulate_grad_batches update_freq",
    "global_batch_size": "total_batch_size effective_batch_size global_train_batch_size",
    "learning_rate": "lr learn_rate base_lr max_lr peak_lr init_lr initial_lr eta step_size",
    "weight_decay": "wd decay l2 l2_reg weight_decay_rate adam_weight_decay",
    "adam_beta1": "beta1 beta_1 adam_beta_1",
    "adam_beta2": "beta2 beta_2 adam_beta_2",
    "adam_epsilon": "eps epsilon adam_eps",
    "max_grad_norm": "clip clip_norm clip_grad clip_grad_norm clip_gradients grad_clip grad_clip_norm grad_norm"
    " gradient_clip gradient_clipping gradient_clip_val max_norm max_gradient_norm",
    "num_train_epochs": "epoch epochs num_epoch num_epochs n_epoch n_epochs max_epoch max_epochs train_epoch"
    " train_epochs number_of_epochs total_epochs",
    "max_steps": "steps num_steps n_steps train_steps max_train_steps num_train_steps num_training_steps total_steps"
    " training_steps max_iter max_iters iterations",
    "lr_scheduler_type": "scheduler schedule scheduler_type scheduler_name lr_schedule lr_scheduler lr_scheduler_name"
    " lr_decay_style",
    "warmup_steps": "warmup warm_up num_warmup_steps n_warmup_steps warm_up_steps warmup_proportion warmup_fraction"
    " warmup_steps_ratio lr_warmup lr_warmup_steps",
    "label_smoothing_factor": "label_smoothing smoothing label_smooth ls_factor",
    "layerwise_lr_decay": "llrd layer_decay lr_layer_decay layer_lr_decay layerwise_decay layer_wise_lr_decay",
    "reinit_layers": "reinit reinit_n_layers num_reinit_layers reinitialize_layers",
    "ema_decay": "ema use_ema ema_rate model_ema",
    "rdrop_alpha": "rdrop r_drop use_rdrop rdrop_coef",
    "fgm_epsilon": "fgm use_fgm fgm_eps",
    "gradient_checkpointing": "grad_checkpoint grad_checkpointing gradient_checkpoint checkpoint_activations"
    " use_gradient_checkpointing recompute",
    "optim": "opt optimizer optimiser optimizer_type optimizer_name",
    "torch_compile": "compile compile_model use_compile",
    "cuda_graph": "cuda_graphs use_cuda_graph",
    "dataloader_drop_last": "drop_last",
    "eval_strategy": "eval_mode evaluate_strategy",
    "eval_steps": "eval_every eval_interval eval_freq evaluation_steps evaluate_every val_check_interval",
    "save_steps": "save_every save_interval save_freq checkpoint_every checkpoint_steps checkpoint_interval",
    "save_total_limit": "save_limit max_checkpoints keep_checkpoints keep_last_n_checkpoints",
    "load_best_model_at_end": "load_best load_best_model save_best save_best_model keep_best restore_best_weights",
    "metric_for_best_model": "metric best_metric eval_metric monitor",
    "early_stopping_patience": "patience early_stop early_stopping early_stop_patience",
    "fp16": "half half_precision float16 amp use_amp use_fp16",
    "bf16": "bfloat16 use_bf16",
    "fp16_opt_level": "opt_level amp_level amp_opt_level",
    "tf32": "allow_tf32",
    "device": "gpu gpus gpu_id gpu_ids npu npu_id cuda device_ids devices",
    "use_cpu": "cpu cpu_only force_cpu",
    "ddp_timeout": "dist_timeout nccl_timeout hccl_timeout",
    "ddp_backend": "dist_backend distributed_backend",
    "profile_steps": "profile profiler use_profiler",
}


def _letters(name: str) -> str:
    return re.sub(r"[_\W]", "", name).lower()


_FLAG_OF_MEANING = {_letters(word): flag for flag, words in _MEANINGS.items() for word in words.split()}
# Similar to a flag in letters, but with another meaning: a loss function, a width, a held-out fraction.
_OTHER_THINGS = frozenset(map(_letters, ("loss", "loss_type", "loss_fn", "weight", "hidden", "simple", "test_size")))
_SHORTEST_BEGINNING = 5
_LEAST_SHARE_OF_NAME = 3 / 8


def suggested_flag(name: str) -> str:
    """The one flag of `run_glue.py` that an unknown `name` means; "" if none is certain.

    Args:
        name: the name as typed, without the leading dashes.
    """
    kept = [old for old, legacy in LEGACY_FLAGS.items() if not legacy.refused]
    own = {known: known for known in (*FLAGS, *kept, *OWN_SWITCHES)}
    refused = [old for old in LEGACY_FLAGS if old not in own]
    return _meant(name, own, {flag: flag for flag in _MEANINGS}, refused)


def suggested_option(name: str, options: Collection[str], same: Mapping[str, str]) -> str:
    """The one option of another command that an unknown `name` means; "" if none is certain.

    Args:
        options: names of the command's options.
        same: flag of `run_glue.py` -> what is the same in the command, where it has another name.
    """
    flags = {**{name: name for name in options if name in FLAGS}, **same}
    renamed = {old: flags[legacy.flag] for old, legacy in LEGACY_FLAGS.items() if legacy.flag in flags}
    own = {**renamed, **flags, **{name: name for name in options}}
    return _meant(name, own, {flag: own[flag] for flag in _MEANINGS if flag in own}, ())


def _meant(name: str, own: Mapping[str, str], meant: Mapping[str, str], refused: Collection[str]) -> str:
    """The flag that `name` means, by all means of this module.

    Args:
        own: spelling -> flag.
        meant: flag of `_MEANINGS` -> flag.
        refused: names that are flags too, and never suggested.
    """
    letters = _letters(name[:80])
    if not letters or letters in _OTHER_THINGS:
        return ""
    respelt = [flag for known, flag in own.items() if _letters(known) == letters]
    if respelt or _FLAG_OF_MEANING.get(letters) in meant:
        return (respelt or [meant[_FLAG_OF_MEANING[letters]]])[0]
    if letters in _FLAG_OF_MEANING:
        return ""  # it means something that the command does not have
    return _begun(name.lower(), own, refused) or _mistyped(name.lower(), own, meant)


def _begun(name: str, own: Mapping[str, str], refused: Collection[str]) -> str:
    longer = [known for known in (*own, *refused) if known.startswith(name) and known not in OWN_SWITCHES]
    if len(name) < _SHORTEST_BEGINNING or len(longer) != 1 or len(name) < _LEAST_SHARE_OF_NAME * len(longer[0]):
        return ""
    return own.get(longer[0], "")


def _mistyped(name: str, own: Mapping[str, str], meant: Mapping[str, str]) -> str:
    """The flag that `name` misspells. "" if two flags are equally close."""
    words = {word: meant[flag] for flag in meant for word in _MEANINGS[flag].split() if len(word) > _SHORTEST_BEGINNING}
    flag_of = {**words, **own}
    others = [*_MEANINGS, *(word for words in _MEANINGS.values() for word in words.split())]
    vocabulary = {"text", *(word for known in (*flag_of, *others, *FLAGS, *LEGACY_FLAGS) for word in known.split("_"))}
    slips = {known: slip for known in flag_of if (slip := _slips(name, known, vocabulary))}
    best = {flag_of[known] for known, slip in slips.items() if slip == min(slips.values())}
    return best.pop() if len(best) == 1 else ""


def _slips(typed: str, known: str, vocabulary: Collection[str]) -> int:
    """The number of typing errors; 0 if these are two different names.

    A word of a flag is never a misspelling of another word (text, test), except for a plural. Digits are never errors:
    bf16 is not fp16. A word may have one error, or two if it has eight letters or more. A name may
    have two errors. A word of two letters may have none.
    """
    if re.findall(r"\d+", typed) != re.findall(r"\d+", known) or len(known) < 4:
        return 0
    count = 0
    for one, other in zip_longest(typed.split("_"), known.split("_"), fillvalue=""):
        slips = _distance(one, other)
        most = int(len(other) >= 3) + int(len(other) >= 8)
        is_plural = one.removesuffix("s") == other.removesuffix("s")
        if slips > most or (slips and not is_plural and one in vocabulary):
            return 0
        count += slips
    return count if count <= 2 else 0


def _distance(one: str, other: str) -> int:
    """The number of letters to add, remove, replace, or swap with the next one (optimal string alignment)."""
    above, row = [], list(range(len(other) + 1))
    for i, letter in enumerate(one):
        two_above, above, row = above, row, [i + 1]
        for j, wanted in enumerate(other):
            cost = min(above[j + 1] + 1, row[j] + 1, above[j] + (letter != wanted))
            if i and j and letter == other[j - 1] and one[i - 1] == wanted:
                cost = min(cost, two_above[j - 1] + 1)
            row.append(cost)
    return row[-1]
