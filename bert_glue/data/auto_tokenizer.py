"""Loads the tokenizer of a model folder with the AutoTokenizer of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_glue.errors import MachineError, UserError, first_line
from bert_glue.storage.files import check_not_lfs_pointer, json_object

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "*.model")
_NO_VOCABULARY = "it has neither a tokenizer.json nor a vocabulary to build a tokenizer from"


def load_tokenizer(folder: Path, config: dict | None, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """A tokenizer of transformers, and the settings that were chosen here because no file of the folder has them.

    Args:
        config: the config of the model, for folders that do not name the class of their tokenizer. None: read it from
            the folder.

    Raises:
        MachineError: the vocabulary is missing or damaged, or a package for it is not installed.
    """
    for pattern in _VOCABULARIES:
        for file in folder.glob(pattern):
            check_not_lfs_pointer(file)
    tokenizer = _auto_tokenizer(folder, config, trust_remote_code, {})
    # Without a vocabulary file transformers 5 returns a tokenizer that only knows its special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise MachineError(f"the tokenizer in {folder} cannot be used: {_NO_VOCABULARY}")
    with library_errors(folder):
        chosen = _chosen_case(folder, tokenizer)
    return (_auto_tokenizer(folder, config, trust_remote_code, chosen) if chosen else tokenizer), chosen


def _auto_tokenizer(folder: Path, config: dict | None, trust_remote_code: bool, settings: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

    with library_errors(folder), warnings.catch_warnings():
        # transformers 4.44 announces here a change of decoding, which nothing here does.
        warnings.filterwarnings("ignore", message="`clean_up_tokenization_spaces`", category=FutureWarning)
        if config is not None and config.get("model_type") in CONFIG_MAPPING:
            settings = {**settings, "config": AutoConfig.for_model(**config)}
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **settings)
        tokenizer("\N{SNOWMAN}")  # a vocabulary without an unknown token fails here, not in the middle of the data
    return tokenizer


@contextmanager
def library_errors(folder: Path) -> Iterator[None]:
    """Turns any error of the libraries about a broken tokenizer, including a Rust panic, into one line."""
    try:
        yield
    except BaseException as error:
        is_theirs = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_theirs or isinstance(error, UserError | MemoryError):
            raise
        raise MachineError(f"the tokenizer in {folder} cannot be used: {_cause(folder, error)}") from error


def _cause(folder: Path, error: BaseException) -> str:
    """Why loading failed. For a bad sentencepiece file the error of transformers wrongly blames a missing package."""
    if not any(file for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        return f"{_NO_VOCABULARY} ({first_line(error)})"
    for file in sorted(folder.glob("*.model")):
        try:
            import google.protobuf  # noqa: F401
            from sentencepiece import SentencePieceProcessor
        except ImportError as missing:
            return f"{file.name} needs the package {missing.name} (pip install sentencepiece protobuf)"
        try:
            SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError):
            return f"{file.name} is not a sentencepiece vocabulary"
    return first_line(error)


def _chosen_case(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """`do_lower_case` for a BERT tokenizer where no file of the folder says it: the vocabulary decides.

    The default of transformers does not know the vocabulary. It lower-cases, so that the names of a cased vocabulary
    become unknown words. In version 5.0.0 it does not, so that with an uncased one every word with a capital does.
    """
    lowers = getattr(tokenizer.backend_tokenizer.normalizer, "lowercase", None) if tokenizer.is_fast else None
    if lowers is None:
        return {}
    paths = (folder / "tokenizer_config.json", folder / "tokenizer.json")
    settings, whole = (json_object(path) if path.is_file() else {} for path in paths)
    stored = (whole.get("normalizer") or {}).get("lowercase")
    # A stored False is no statement where the class lower-cases in spite of it, as transformers 4 does.
    if "do_lower_case" in settings or stored or (stored is False and not lowers):
        return {}
    is_cased = _is_cased(tokenizer)
    return {"do_lower_case": not is_cased} if is_cased or not lowers else {}


def _is_cased(tokenizer: Any) -> bool:
    """True if the vocabulary has words of two or more letters that begin with a capital."""
    return any(len(word) > 1 and word[0].isascii() and word[0].isupper() for word in tokenizer.get_vocab())
