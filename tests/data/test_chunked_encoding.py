"""Rows are cut as the tokenizers library cuts them, in memory and time that grow with the text alone."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from bert_glue.data import chunked_encoding
from bert_glue.data.chunked_encoding import encode_rows

ALPHABET = "abcdefgh   é中,.\n\t"


def _word_piece() -> Tokenizer:
    words = ["[UNK]", "[CLS]", "[SEP]", "cat", "dog", *"abcdefghe,.", "##cat", *(f"##{c}" for c in "abcdefgh"), "中"]
    backend = Tokenizer(models.WordPiece({w: n for n, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return backend


def _trained(kind: str) -> Tokenizer:
    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    backend.train_from_iterator(["the cat sat on a mat", "abc defgh abab cdcd hgfe bad cab"] * 20, trainer)
    if kind == "bpe":
        backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    else:  # as XLNet: specials at the end, types 0, 1 and 2
        backend.post_processor = processors.TemplateProcessing(
            single="$A:0 </s>:0 <s>:2", pair="$A:0 </s>:0 $B:1 </s>:1 <s>:2", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return backend


TOKENIZERS = {"word_piece": _word_piece, "bpe": lambda: _trained("bpe"), "unigram": lambda: _trained("unigram")}


def _text(random_: random.Random, longest: int) -> str:
    return "".join(random_.choice(ALPHABET) for _ in range(random_.randrange(longest)))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("texts", [1, 2])
def test_rows_are_those_of_the_library(kind, texts) -> None:
    backend, random_ = TOKENIZERS[kind](), random.Random(7)
    columns = [[_text(random_, 10 ** random_.randrange(1, 3)) for _ in range(60)] for _ in range(texts)]
    for at in (3, 4):  # equally long texts: the second takes the odd token
        columns[0][at] = columns[-1][at] = "cat dog abc " * 40
    for longest in (8, 9, 33, 60):
        ours = [row for chunk in encode_rows(backend, columns, longest) for row in chunk]
        backend.enable_truncation(longest, strategy="longest_first")
        theirs = backend.encode_batch(columns[0] if texts == 1 else list(zip(*columns, strict=True)))
        assert [row.ids for row in ours] == [e.ids for e in theirs]
        assert [row.types for row in ours] == [e.type_ids for e in theirs]


@pytest.mark.parametrize("lengths", [(700, 701), (701, 700), (700, 700), (90, 3000), (3000, 126)])
def test_the_odd_token_goes_to_the_longer_text(lengths) -> None:
    backend = _word_piece()
    row = ["cat " * lengths[0], "dog " * lengths[1]]
    (chunk,) = encode_rows(backend, [[text] for text in row], 128)
    backend.enable_truncation(128, strategy="longest_first")
    assert chunk[0].ids == backend.encode(*row).ids


@pytest.mark.parametrize("text", ["a" * 300_000, " " * 300_000 + "cat", "cat dog " + "b" * 200_000 + " cat" * 300])
def test_runs_without_an_end_are_read_to_theirs(text) -> None:
    backend = _word_piece()
    (chunk,) = encode_rows(backend, [[text]], 64)
    backend.enable_truncation(64)
    assert chunk[0].ids == backend.encode(text).ids


def test_chunks_have_a_bounded_size() -> None:
    sizes = [len(chunk) for chunk in encode_rows(_word_piece(), [["cat dog " * 4] * 20_000], 16)]
    assert sum(sizes) == 20_000
    assert max(sizes) < 6000


def test_time_grows_with_the_text_and_not_with_its_square() -> None:
    backend, seconds = _word_piece(), []
    for words in (20_000, 80_000):
        began = time.perf_counter()
        list(encode_rows(backend, [["cat " * words] * 4, ["dog " * words] * 4], 128))
        seconds.append(time.perf_counter() - began)
    assert seconds[1] < 12 * seconds[0] + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("text", ["'cat dog ' * 6_250_000", "'a' * 50_000_000", "' ' * 50_000_000 + 'cat'"])
def test_a_text_of_50_megabytes_takes_less_than_500(text) -> None:
    script = f"""
import resource, sys
sys.path[:0] = [{str(Path(chunked_encoding.__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
from test_chunked_encoding import _word_piece, encode_rows
backend, text = _word_piece(), {text}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
list(encode_rows(backend, [[text], [text]], 128))
sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 500_000)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
