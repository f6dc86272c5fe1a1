"""Rows in overlapping windows: those of transformers' fast tokenizers, their bound, and their means."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from test_chunked_encoding import TOKENIZERS, _text
from tiny_run import make_model
from token_splits import _assembler
from transformers import PreTrainedTokenizerFast

from bert_glue.data.batching import Batch, TokenSplit
from bert_glue.data.chunked_encoding import Windows, WindowTooSmallError, encode_windows
from bert_glue.data.sources import Split
from bert_glue.data.tokenization import TextTokenizer, TokenTable, tokenize
from bert_glue.errors import DataError, UsageError


def _theirs(tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...], length: int, stride: int) -> list[list[int]]:
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    which = "only_first" if len(texts) == 1 or counts[0] > counts[1] else "only_second"
    options = {"truncation": which, "max_length": length, "stride": stride, "return_overflowing_tokens": True}
    if sum(counts) + tokenizer.num_special_tokens_to_add(len(texts) == 2) <= length:
        options = {}
    found = tokenizer(*texts, **options)["input_ids"]
    return found if isinstance(found[0], list) else [found]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_windows_are_those_of_transformers(kind, side) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[kind](), truncation_side=side)
    draw = random.Random(f"{kind} {side}")
    # Not empty: transformers takes an empty second text for none.
    long, short = ([f"cat{_text(draw, 10 ** draw.randrange(1, most))}" for _ in range(50)] for most in (4, 2))
    for columns in ((long,), (short, long), (long, short)):
        for length, stride in ((24, 0), (32, 5), (48, 11)):
            chunks = encode_windows(tokenizer, columns, length, Windows(stride, 1000))
            ours = [[window.ids for window in row] for chunk in chunks for row in chunk]
            rows = zip(*columns, strict=True)
            assert ours == [_theirs(tokenizer, texts, length, stride) for texts in rows]
            assert max(map(len, ours)) > 10


def test_types_and_special_tokens_stand_in_every_window() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["word_piece"]())
    ((row,),) = encode_windows(tokenizer, (["cat"], ["dog " * 9]), 8, Windows(1, 64))
    assert [len(window.ids) for window in row] == [8, 8, 7]
    assert all(window.ids[:3] == [1, 3, 2] and window.ids[-1] == 2 for window in row)
    assert all(window.types == [0] * 3 + [1] * (len(window.ids) - 3) and not window.is_cut for window in row)


def test_a_row_has_a_bounded_number_of_windows() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["word_piece"]())
    texts = ["cat " * 20, "cat " * 21, "dog " * 4_000_000, "cat"]
    (rows,) = encode_windows(tokenizer, (texts,), 10, Windows(2, 3))
    assert [len(row) for row in rows] == [3, 3, 3, 1]
    assert [row[0].is_cut for row in rows] == [False, True, True, False]


def test_a_window_without_room_is_refused_with_numbers(tmp_path) -> None:
    tokenizer = TextTokenizer(make_model(tmp_path / "model"))
    split = Split("train", (["a dog", "a cat " * 8], ["a cat " * 20, "a dog " * 9]), [0, 1], "own.csv")
    with pytest.raises(UsageError, match="--doc_stride 13: .* has room for 13 tokens of text; give less than 13"):
        tokenizer.encode(split, 16, Windows(13, 64))
    with pytest.raises(
        DataError, match=r"own.csv: row 2: --doc_stride 5: .* has room for 5; give a --doc_stride below"
    ):
        tokenizer.encode(split, 24, Windows(5, 64))
    with pytest.raises(DataError, match=r"row 2: .* has room for 0; give a longer --max_seq_length"):
        tokenizer.encode(split, 16, Windows(2, 64))
    assert tokenizer.encode(split, 25, Windows(5, 64)).windows == 16


def test_a_tokenizer_in_python_gives_the_same_windows(tmp_path, monkeypatch) -> None:
    fast = TextTokenizer(make_model(tmp_path / "model"))
    split = Split("train", (["a dog runs", "a cat"], ["a bird sings " * 9, "the old mill"]), None, "own.csv")
    expected = fast.encode(split, 16, Windows(3, 64))

    class InPython:
        """The vocabulary of `fast`, as transformers' tokenizers in Python answer."""

        is_fast, truncation_side = False, "right"

        def __call__(self, texts, **options):
            return {"input_ids": fast.stock(texts, add_special_tokens=False)["input_ids"]}

        def num_special_tokens_to_add(self, is_pair):
            return 2 + is_pair

        def prepare_for_model(self, first, second=()):
            begin, end = [[2, *first, 3], [*second, 3]]
            return {"input_ids": begin + end, "token_type_ids": [0] * len(begin) + [1] * len(end)}

    rows = [row for chunk in encode_windows(InPython(), split.texts, 16, Windows(3, 64)) for row in chunk]
    assert [len(row) for row in rows] == np.diff(expected.first).tolist() == [4, 1]
    assert sum((window.ids for row in rows for window in row), []) == expected.ids.tolist()
    assert sum((window.types for row in rows for window in row), []) == expected.types.tolist()


def test_windows_are_cached_by_their_own_key(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = TextTokenizer(make_model(tmp_path / "model"))
    split = Split("train", (["a dog runs near the old mill", "a cat"],), [0, 1], "own.csv")
    for windows in (None, Windows(2, 64), Windows(1, 64), Windows(2, 1)):
        made, how = tokenize(tokenizer, split, 8, windows=windows)
        again, how_again = tokenize(tokenizer, split, 8, windows=windows)
        assert (how, how_again) == ("made", "cached")
        assert made.row_counts == again.row_counts and made.ids.tolist() == again.ids.tolist()
        assert len(made) == len(again) == 2
    assert made.row_counts == {"windows": 2, "windowed_rows": 0, "cut_rows": 1}


def _windowed() -> TokenSplit:
    """Rows of 1, 3 and 2 sequences; the first id of a sequence is 10 x row + window."""
    firsts = [0, 10, 11, 12, 20, 21]
    ids = np.concatenate([np.array([first, *[99] * at], np.int32) for at, first in enumerate(firsts)])
    offsets = np.concatenate([[0], np.cumsum(np.arange(1, 7))])
    table = TokenTable(ids, offsets, np.zeros(len(ids), np.int8), np.array([0, 1, 4, 6]))
    return TokenSplit("train", table, np.array([5, 6, 7]))


def test_a_batch_holds_all_windows_of_its_rows() -> None:
    split = _windowed()
    assert len(split) == 3 and split.table.lengths.tolist() == [1, 9, 11] and split.table.windowed_rows == 2
    for padding in ("packed", "longest"):
        batch = _assembler(padding)(split, np.array([2, 0]))
        assert (batch.samples, batch.windows, batch.lengths) == (2, (2, 1), (5, 6, 1))
        assert batch.labels.tolist() == [7, 5] and batch.real_tokens == 12
    assert _assembler("packed")(split, np.array([0])).windows is None
    assert split.table.ids_of(1).tolist() == split.table.ids[1:10].tolist()


def test_the_logits_of_a_row_are_the_mean_over_its_windows() -> None:
    logits = torch.tensor([[1.0, 0.0], [2.0, 3.0], [4.0, 5.0], [9.0, 7.0]], requires_grad=True)
    batch = Batch({}, None, (4, 4, 4, 4), 16, windows=(1, 3))
    means = batch.row_means(logits)
    assert means.tolist() == [[1.0, 0.0], [5.0, 5.0]]
    means[1, 0].backward()
    assert logits.grad[:, 0].tolist() == pytest.approx([0.0, 1 / 3, 1 / 3, 1 / 3])
    assert Batch({}, None, (4, 4), 8).row_means(logits) is logits
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    assert _windowed().table.row_means(values).tolist() == [[0, 1], [4, 5], [9, 10]]


def test_no_room_is_told_by_row() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS["word_piece"]())
    with pytest.raises(WindowTooSmallError) as caught:
        list(encode_windows(tokenizer, (["cat", "cat " * 30], ["dog", "dog " * 50]), 32, Windows(4, 64)))
    assert (caught.value.row, caught.value.capacity) == (1, 0)
