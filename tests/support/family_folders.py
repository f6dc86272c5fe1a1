"""Small classifiers of many families with their own kinds of vocabularies, saved by transformers itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = ["river", "stone", "cloud", "green", "seven", "paper", "night", "walks", "under", "sings", "cold", "lamp"]
LABELS = ("low", "middle", "high")
_WORD_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz"]
_WORD_PIECES += ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<cls>", "<sep>"]

Maker = Callable[[Path], Any]


def _word_piece(name: str) -> Maker:
    def make(folder: Path) -> Any:
        (folder / "vocab.txt").write_text("\n".join(_WORD_PIECES) + "\n", encoding="utf-8")
        return _tokenizer_class(name).from_pretrained(folder)

    return make


def _byte_bpe(name: str) -> Maker:
    def make(folder: Path) -> Any:
        from tokenizers import ByteLevelBPETokenizer

        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            [" ".join(WORDS)] * 3, 320, min_frequency=1, show_progress=False, special_tokens=special
        )
        bpe.save_model(str(folder))
        return _tokenizer_class(name).from_pretrained(folder)

    return make


def _sentencepiece(name: str, file: str, special: str = "", **numbers: Any) -> Maker:
    def make(folder: Path) -> Any:
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS)] * 20), model_writer=model, vocab_size=60, hard_vocab_limit=False,
            minloglevel=2, user_defined_symbols=special.split(), **numbers,
        )  # fmt: skip
        (folder / file).write_bytes(model.getvalue())
        return _tokenizer_class(name).from_pretrained(folder)

    return make


def _tokenizer_class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128,
}  # fmt: skip
_NARROW = {**_SIZES, "embedding_size": 16}
_ROBERTA = {**_SIZES, "max_position_embeddings": 130, "type_vocab_size": 1}
_RELATIVE = {
    **_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "type_vocab_size": 0,
}  # fmt: skip
_SPECIAL = "[CLS] [SEP] [MASK]"
_XLM_R = _sentencepiece("XLMRobertaTokenizer", "sentencepiece.bpe.model")
_ALBERT = _sentencepiece("AlbertTokenizer", "spiece.model", _SPECIAL, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1)
_DEBERTA_3 = _sentencepiece(
    "DebertaV2Tokenizer", "spm.model", _SPECIAL, pad_id=0, unk_id=3, bos_id=-1, eos_id=-1, pad_piece="[PAD]",
    unk_piece="[UNK]",
)  # fmt: skip

# model_type -> sizes and tokenizer
FOLDERS: dict[str, tuple[dict[str, Any], Maker]] = {
    "bert": (_SIZES, _word_piece("BertTokenizer")),
    "roberta": (_ROBERTA, _byte_bpe("RobertaTokenizer")),
    "xlm-roberta": (_ROBERTA, _XLM_R),
    "camembert": (_ROBERTA, _sentencepiece("CamembertTokenizer", "sentencepiece.bpe.model")),
    "electra": (_NARROW, _word_piece("ElectraTokenizer")),
    "distilbert": (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 128},
        _word_piece("DistilBertTokenizer"),
    ),
    "albert": (_NARROW, _ALBERT),
    "big_bird": ({**_SIZES, "attention_type": "original_full"}, _ALBERT),
    "canine": (
        {**_SIZES, "num_hash_buckets": 64, "num_hash_functions": 4, "local_transformer_stride": 16},
        lambda folder: _tokenizer_class("CanineTokenizer")(),
    ),
    "convbert": ({**_SIZES, "embedding_size": 32}, _word_piece("ConvBertTokenizer")),
    "data2vec-text": (_ROBERTA, _byte_bpe("RobertaTokenizer")),
    "deberta": (_RELATIVE, _byte_bpe("DebertaTokenizer")),
    "deberta-v2": ({**_RELATIVE, "position_buckets": 16, "norm_rel_ebd": "layer_norm"}, _DEBERTA_3),
    "ernie": (_SIZES, _word_piece("BertTokenizer")),
    "fnet": (
        {**_SIZES, "use_tpu_fourier_optimizations": False},
        _sentencepiece("FNetTokenizer", "spiece.model", _SPECIAL, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1),
    ),
    "funnel": (
        {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1], "num_decoder_layers": 1},
        _word_piece("FunnelTokenizer"),
    ),
    "ibert": (_ROBERTA, _byte_bpe("RobertaTokenizer")),
    "layoutlm": (_SIZES, _word_piece("BertTokenizer")),
    "longformer": ({**_ROBERTA, "attention_window": 8}, _byte_bpe("RobertaTokenizer")),
    "megatron-bert": (_SIZES, _word_piece("BertTokenizer")),
    "mobilebert": (
        {**_NARROW, "intra_bottleneck_size": 16, "num_feedforward_networks": 1, "true_hidden_size": 16},
        _word_piece("MobileBertTokenizer"),
    ),
    "modernbert": (
        {**_SIZES, "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 2},
        _byte_bpe("RobertaTokenizer"),
    ),
    "mpnet": (_ROBERTA, _word_piece("MPNetTokenizer")),
    "rembert": (
        {**_SIZES, "input_embedding_size": 16, "output_embedding_size": 16},
        _sentencepiece("RemBertTokenizer", "sentencepiece.model", _SPECIAL, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1),
    ),
    "roberta-prelayernorm": (_ROBERTA, _byte_bpe("RobertaTokenizer")),
    "roformer": (_NARROW, _word_piece("BertTokenizer")),
    "squeezebert": (
        {**_SIZES, "embedding_size": 32} | dict.fromkeys(("q_groups", "k_groups", "v_groups", "output_groups"), 2),
        _word_piece("SqueezeBertTokenizer"),
    ),
    "xlm-roberta-xl": (_ROBERTA, _XLM_R),
    "xlnet": (
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        _sentencepiece("XLNetTokenizer", "spiece.model", "<sep> <cls> <mask>", unk_id=0, bos_id=1, eos_id=2, pad_id=5),
    ),
    "xmod": ({**_ROBERTA, "default_language": "en_XX", "languages": ["en_XX"]}, _XLM_R),
}


def pipeline_answers(folder: Path, texts: Sequence[tuple[str, ...]], **options: Any) -> np.ndarray:
    """Probabilities of `LABELS` by transformers.pipeline, `[rows, labels]`.

    Args:
        texts: of each row, one or two.
        options: of the tokenizer.
    """
    from transformers import pipeline

    ask = pipeline("text-classification", str(folder), top_k=None)
    rows = []
    for text in texts:
        given: Any = dict(zip(("text", "text_pair"), text, strict=False))
        answer = ask(given, **options)
        rows.append([next(one["score"] for one in answer if one["label"] == label) for label in LABELS])
    return np.array(rows)


def write_folder(model_type: str, folder: Path, bare: bool = False) -> None:
    """A classifier of `LABELS` whose answers differ clearly between texts.

    Args:
        bare: of the tokenizer only the vocabulary file, as old repositories have it.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes, make = FOLDERS[model_type]
    making = folder / "making"
    making.mkdir(parents=True)
    tokenizer = make(folder if bare else making)
    words = {} if model_type == "canine" else {"vocab_size": max(tokenizer.get_vocab().values()) + 1}
    for name in ("pad", "bos", "eos"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            words[f"{name}_token_id"] = number
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: at for at, label in enumerate(LABELS)}}
    config = AutoConfig.for_model(model_type, **{**names, **words, **sizes})
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in making.iterdir():
        file.unlink()
    making.rmdir()
    if not bare:
        tokenizer.save_pretrained(folder)
