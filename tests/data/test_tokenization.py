"""Token ids equal those of transformers, and the cache never returns tokens of other settings."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_models import LFS_POINTER, VOCAB, write_vocab

from bert_glue.data import tokenization
from bert_glue.data.splits import Split
from bert_glue.data.tokenization import TextTokenizer, tokenize
from bert_glue.errors import MachineError, UsageError
from bert_glue.storage.files import cache_folder

TEXTS = (
    "the cat sat on the mat .",
    "",
    "The CAT's café, naïve! Éa",
    "  dog\tran\n\nunable ",
    "中文 cat \u200d \U0001f600 e\u0301 caf\u00e9",
    "supercalifragilistic " + "the cat ran " * 30,
    "[SEP] [MASK] a",
)
SECONDS = ("the dog ran", "big hat !" * 9, "", "a", "cat playing walked the mat", "un", "the cat " * 20)
SINGLE = Split("train", (list(TEXTS),), None, "")
PAIR = Split("train", (list(TEXTS), list(SECONDS)), None, "")


def _write_bert(folder, model_type="bert", **settings):
    write_vocab(folder, **settings)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.fixture(scope="module")
def bert_uncased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncased")
    return _write_bert(folder, do_lower_case=True, tokenizer_class="BertTokenizer")


@pytest.fixture(scope="module")
def bert_cased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cased")
    return _write_bert(folder, do_lower_case=False, tokenizer_class="BertTokenizer")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A byte-level BPE trained here, wrapped as RoBERTa's."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("roberta")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator([*TEXTS, *SECONDS], vocab_size=330, special_tokens=special, show_progress=False)
    bpe._tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(zip(("bos", "pad", "eos", "unk", "mask"), special, strict=True)) | {"cls": "<s>", "sep": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    return folder


def _assert_equals_transformers(folder, theirs, split, max_length):
    table = TextTokenizer(folder).encode(split, max_length)
    columns = [list(column) for column in split.texts]
    wanted = theirs(*columns, truncation=True, max_length=max_length)
    assert len(table) == len(split) and table.offsets[0] == 0 and table.offsets[-1] == len(table.ids)
    for row, (begin, end) in enumerate(zip(table.offsets[:-1], table.offsets[1:], strict=True)):
        assert table.ids[begin:end].tolist() == wanted["input_ids"][row], split.texts[0][row]
        types = wanted["token_type_ids"][row] if "token_type_ids" in wanted else [0] * (end - begin)
        assert table.types[begin:end].tolist() == types, split.texts[0][row]
    assert table.lengths.max() <= max_length


@pytest.mark.parametrize("max_length", [5, 16, 128])
@pytest.mark.parametrize("split", [SINGLE, PAIR], ids=["single", "pair"])
@pytest.mark.parametrize("name", ["bert_uncased", "bert_cased", "roberta"])
def test_equals_transformers(name, split, max_length, request):
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(name)
    theirs = AutoTokenizer.from_pretrained(folder)
    _assert_equals_transformers(folder, theirs, split, max_length)


def test_a_bare_uncased_vocabulary(tmp_path):
    from transformers import BertTokenizerFast as BertTokenizer

    folder = _write_bert(tmp_path)
    theirs = BertTokenizer.from_pretrained(folder, do_lower_case=True)
    _assert_equals_transformers(folder, theirs, PAIR, 32)


def test_a_bare_cased_vocabulary_is_not_lower_cased(tmp_path):
    from transformers import BertTokenizerFast as BertTokenizer

    folder = _write_bert(tmp_path)
    with (folder / "vocab.txt").open("a", encoding="utf-8") as file:
        file.write("The\nCAT\n")
    theirs = BertTokenizer.from_pretrained(folder, do_lower_case=False)
    _assert_equals_transformers(folder, theirs, PAIR, 32)


def test_a_tokenizer_folder_needs_no_config(tmp_path, bert_cased):
    shutil.copy(bert_cased / "vocab.txt", tmp_path / "vocab.txt")
    shutil.copy(bert_cased / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    ours, full = TextTokenizer(tmp_path, {"model_type": "bert"}), TextTokenizer(bert_cased)
    assert np.array_equal(ours.encode(PAIR, 32).ids, full.encode(PAIR, 32).ids)


@pytest.mark.parametrize("is_cased", [False, True])
def test_a_saved_tokenizer_is_the_same_for_transformers(tmp_path, is_cased):
    """A bare vocab.txt leaves lower-casing to a guess; the saved folder states it."""
    from transformers import AutoTokenizer

    folder = _write_bert(tmp_path / "from")
    if is_cased:
        with (folder / "vocab.txt").open("a", encoding="utf-8") as file:
            file.write("The\nCAT\n")
    tokenizer, saved = TextTokenizer(folder), tmp_path / "to"
    saved.mkdir()
    table = tokenizer.encode(PAIR, 16)
    tokenizer.save(saved)
    (saved / "config.json").write_text('{"model_type": "bert"}')
    theirs = AutoTokenizer.from_pretrained(saved)
    assert theirs.pad_token == "[PAD]"
    wanted = theirs(*map(list, PAIR.texts), truncation=True, max_length=16)["input_ids"]
    assert table.ids.tolist() == [i for row in wanted for i in row]
    assert np.array_equal(TextTokenizer(saved).encode(PAIR, 16).ids, table.ids)
    long = theirs("the cat " * 100)["input_ids"]
    assert len(long) == 202, "the cut of the run must not be saved"


def test_saving_into_its_own_folder(tmp_path):
    folder = _write_bert(tmp_path, do_lower_case=True)
    before = TextTokenizer(folder).encode(PAIR, 16).ids
    TextTokenizer(folder).save(folder)
    assert np.array_equal(TextTokenizer(folder).encode(PAIR, 16).ids, before)


@pytest.mark.parametrize(("split", "limit"), [(SINGLE, 2), (PAIR, 3)], ids=["single", "pair"])
def test_a_limit_without_room_for_text(bert_uncased, split, limit):
    with pytest.raises(UsageError, match=f"--max_seq_length {limit}"):
        TextTokenizer(bert_uncased).encode(split, limit)
    assert TextTokenizer(bert_uncased).encode(split, limit + 1).lengths.max() == limit + 1


def test_no_rows(bert_uncased):
    table = TextTokenizer(bert_uncased).encode(Split("test", ([],), None, ""), 16)
    assert len(table) == 0 and table.offsets.tolist() == [0]


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_a_pointer_or_rubbish_instead_of_a_tokenizer(bert_uncased, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(bert_uncased, folder)
    (folder / name).write_text(LFS_POINTER)
    with pytest.raises(MachineError, match=f"{name} is a Git-LFS pointer"):
        TextTokenizer(folder)
    (folder / name).write_text("rubbish\n")
    with pytest.raises(MachineError, match="cannot be used"):
        TextTokenizer(folder)


def test_nothing_to_tokenize_with(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(MachineError, match="neither a tokenizer.json"):
        TextTokenizer(tmp_path)


# ---- what transformers decides by the other files ----


def _with(folder: Path, settings: dict, **files: dict) -> Path:
    """A BERT folder with both vocab.txt and a tokenizer.json that lower-cases, `settings` and more JSON files."""
    from transformers import BertTokenizerFast as BertTokenizer

    _write_bert(folder)
    whole = BertTokenizer.from_pretrained(folder).backend_tokenizer
    (folder / "tokenizer.json").write_text(whole.to_str(), encoding="utf-8")
    for name, content in {"tokenizer_config": settings, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


SETTINGS = {
    "cased": {"do_lower_case": False},
    "accents stay": {"do_lower_case": True, "strip_accents": False},
    "Chinese words stay": {"tokenize_chinese_chars": False},
    "no token types": {"model_input_names": ["input_ids", "attention_mask"]},
    "the end is kept": {"truncation_side": "left"},
    "padding before": {"padding_side": "left"},
    "another separator": {"sep_token": "cat", "cls_token": "dog"},
    "of DistilBERT": {"tokenizer_class": "DistilBertTokenizer"},
    "letters": {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic",
                "subword_tokenizer_type": "character"},
}  # fmt: skip


@pytest.mark.parametrize("max_length", [9, 64])
@pytest.mark.parametrize("split", [SINGLE, PAIR], ids=["single", "pair"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_count_as_for_transformers(tmp_path, settings, split, max_length):
    from transformers import AutoTokenizer

    folder = _with(tmp_path / "from", settings)
    theirs = AutoTokenizer.from_pretrained(folder)
    _assert_equals_transformers(folder, theirs, split, max_length)
    ours = TextTokenizer(folder)
    assert ours.pads_left is (theirs.padding_side == "left")
    (saved := tmp_path / "to").mkdir()
    ours.save(saved)
    (saved / "config.json").write_text('{"model_type": "bert"}')
    _assert_equals_transformers(saved, theirs, split, max_length)


def test_added_tokens_count_as_for_transformers(tmp_path):
    from transformers import AutoTokenizer

    folder = _write_bert(tmp_path / "from", do_lower_case=True)
    (folder / "added_tokens.json").write_text(json.dumps({"[MAT]": len(VOCAB), "naïve!": len(VOCAB) + 1}))
    theirs = AutoTokenizer.from_pretrained(folder)
    split = Split("x", (["the [MAT] cat naïve! dog", "[MAT][MAT]"],), None, "")
    _assert_equals_transformers(folder, theirs, split, 32)
    assert len(VOCAB) in TextTokenizer(folder).encode(split, 32).ids
    (saved := tmp_path / "to").mkdir()
    TextTokenizer(folder).save(saved)
    (saved / "config.json").write_text('{"model_type": "bert"}')
    _assert_equals_transformers(saved, theirs, split, 32)


@pytest.mark.parametrize(
    ("words", "settings", "is_told"),
    [
        (["The", "Cat"], {}, True),
        (["The", "Cat"], {"do_lower_case": True}, False),
        (["The", "Cat"], {"do_lower_case": False}, False),
        (["T", "C"], {}, False),
    ],
    ids=["cased", "said to be lower", "said to be cased", "letters alone"],
)
def test_a_choice_against_transformers_is_told(tmp_path, words, settings, is_told):
    folder = _write_bert(tmp_path, **settings)
    with (folder / "vocab.txt").open("a", encoding="utf-8") as file:
        file.write("\n".join(words) + "\n")
    notes = TextTokenizer(folder).notes
    assert any("vocabulary has capitals: they are kept" in note for note in notes) is is_told


def test_ids_and_types_beyond_the_model_s_tables_are_refused(tmp_path):
    folder = _write_bert(tmp_path, do_lower_case=True)
    with pytest.raises(MachineError, match="gives token id .* the model has only 9 rows"):
        TextTokenizer(folder, word_rows=9).encode(SINGLE, 16)
    with pytest.raises(MachineError, match="gives token type 1, but the model has only 1 rows"):
        TextTokenizer(folder, type_rows=1).encode(PAIR, 16)
    assert TextTokenizer(folder, type_rows=1).encode(SINGLE, 16).types.max() == 0


def test_token_types_of_any_kind_are_kept(tmp_path):
    """XLNet's class token has type 2, at the end of a row."""
    from family_folders import write_folder

    write_folder("xlnet", tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_input_names": names}))
    table = TextTokenizer(tmp_path).encode(Split("x", (["river stone"], ["cloud"]), None, ""), 32)
    assert sorted(set(table.types.tolist())) == [0, 1, 2] and table.types[-1] == 2


def test_a_damaged_sentencepiece_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "albert"}')
    (tmp_path / "spiece.model").write_bytes(b"no vocabulary")
    with pytest.raises(MachineError, match="spiece.model is not a sentencepiece vocabulary"):
        TextTokenizer(tmp_path)


# ---- cache ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BERT_GLUE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _same(a, b) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "offsets", "types"))


def test_the_second_time_comes_from_the_cache(cache, bert_uncased):
    tokenizer = TextTokenizer(bert_uncased)
    made, how = tokenize(tokenizer, PAIR, 16)
    again, how_again = tokenize(TextTokenizer(bert_uncased), PAIR, 16)
    assert (how, how_again) == ("made", "cached") and _same(made, again)
    assert isinstance(again.ids, np.memmap) and not isinstance(made.ids, np.memmap)
    assert tokenize(tokenizer, PAIR, 16, refresh=True)[1] == "made"
    assert tokenize(tokenizer, PAIR, 16)[1] == "cached"
    assert not [p for p in (cache / "tokens").iterdir() if p.name.startswith(".making")]


@pytest.mark.parametrize("name", ["ids.npy", "offsets.npy", "types.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_table_is_made_again(cache, bert_uncased, name, damage):
    tokenizer = TextTokenizer(bert_uncased)
    made, _ = tokenize(tokenizer, PAIR, 16)
    (path,) = cache.glob(f"tokens/*/{name}")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "changed" else content[:-3])
    again, how = tokenize(tokenizer, PAIR, 16)
    assert how == "made" and _same(made, again)
    assert tokenize(tokenizer, PAIR, 16)[1] == "cached"


@pytest.mark.parametrize("has_locks", [True, False])
def test_jobs_that_start_together_tokenize_once(cache, bert_uncased, monkeypatch, has_locks):
    """The others wait for the first and read its table; without locks each makes its own."""
    if not has_locks:
        cache.mkdir()
        (cache / "locks").write_text("a file where the folder should be")
    # One a job, as processes have: threads that share one make its Rust part panic.
    tokenizers, made = [TextTokenizer(bert_uncased) for _ in range(3)], []
    encode = TextTokenizer.encode

    def slow(self, *given):
        made.append(given)
        time.sleep(0.5)
        return encode(self, *given)

    monkeypatch.setattr(TextTokenizer, "encode", slow)
    with ThreadPoolExecutor(3) as pool:
        found = [job.result() for job in [pool.submit(tokenize, one, PAIR, 16) for one in tokenizers]]
    assert len(made) == (1 if has_locks else 3)
    assert sorted(how for _, how in found) == (["cached", "cached", "made"] if has_locks else ["made"] * 3)
    assert all(_same(table, found[0][0]) for table, _ in found)


def test_an_unwritable_cache_is_said_and_survived(cache, bert_uncased):
    cache.write_text("a file where the folder should be")
    table, how = tokenize(TextTokenizer(bert_uncased), PAIR, 16)
    assert how.startswith("made (not cached: ") and len(how) > 20 and len(table) == len(PAIR)


def _pair(first, second) -> Split:
    return Split("train", (first, second), None, "")


@pytest.mark.parametrize(
    "other",
    [
        _pair(["the cat"], ["sat."]),
        _pair(["the ca"], ["t sat"]),
        _pair(["the cat sat"], [""]),
        Split("train", (["the cat", " sat"],), None, ""),
        Split("train", (["the cat sat"],), None, ""),
    ],
    ids=["content", "border of columns", "empty column", "two rows", "one column"],
)
def test_other_texts_have_another_key(cache, bert_uncased, other):
    tokenizer = TextTokenizer(bert_uncased)
    tokenize(tokenizer, _pair(["the cat"], [" sat"]), 16)
    assert tokenize(tokenizer, other, 16)[1] == "made"


def test_order_length_and_tokenizer_are_part_of_the_key(cache, bert_uncased, bert_cased):
    split = _pair(["the cat", "a dog"], ["sat", "ran"])
    tokenizer = TextTokenizer(bert_uncased)
    tokenize(tokenizer, split, 16)
    assert tokenize(tokenizer, _pair(["a dog", "the cat"], ["ran", "sat"]), 16)[1] == "made"
    assert tokenize(tokenizer, split, 17)[1] == "made"
    assert tokenize(TextTokenizer(bert_cased), split, 16)[1] == "made"
    # Labels, split name and origin are not tokenized.
    assert tokenize(tokenizer, Split("test", split.texts, [1, 0], "elsewhere"), 16)[1] == "cached"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"BERT_GLUE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/bert_glue"),
        ({"HOME": "/c"}, "/c/.cache/bert_glue"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, expected):
    for name in ("BERT_GLUE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected


def test_a_job_that_was_a_moment_faster_is_no_error(tmp_path, monkeypatch):
    """Two jobs make the same table; the second finds the first one's in its place."""
    monkeypatch.setenv("BERT_GLUE_CACHE", str(tmp_path))
    table = tokenization.TokenTable(np.array([1, 2], np.int32), np.array([0, 2]), np.zeros(2, np.int8))
    folder = tmp_path / "tokens" / "key"
    original, others = Path.rename, []

    def late(path: Path, target: Path) -> Path:
        if path.name == "table" and not others:
            others.append(path)
            tokenization._write(folder, table)  # the other job, between our two renames
        return original(path, target)

    monkeypatch.setattr(Path, "rename", late)
    tokenization._write(folder, table)
    assert tokenization._read(folder) is not None
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_what_killed_jobs_left_is_cleared_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setenv("BERT_GLUE_CACHE", str(tmp_path))
    table = tokenization.TokenTable(np.array([1, 2], np.int32), np.array([0, 2]), np.zeros(2, np.int8))
    for name, age in ((".making-old", 90_000), (".making-new", 60)):
        inside = tmp_path / "tokens" / name / "table"
        inside.mkdir(parents=True)
        (inside / "ids.npy").write_bytes(b"half")
        os.utime(inside.parent, (time.time() - age,) * 2)
    tokenization._write(tmp_path / "tokens" / "key", table)
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {"key", ".making-new"}
