"""Loads data sets from the hub, and data sets saved by `datasets`, as tables.

Importing `datasets` takes one to two seconds, so the functions import it. Without a network it retries for 24 s, and
its error names neither the hub nor a way out. The hub is therefore probed first, for 5 s at most.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_glue.data.readers import class_names_of, from_arrow, is_data_file
from bert_glue.data.tables import Table
from bert_glue.errors import DataError, first_line
from bert_glue.hub import client
from bert_glue.hub.client import start_probe
from bert_glue.hub.modelscope import fetch


def open_data(name: str, config: str | None, args: Any) -> Any:
    """A `datasets.DatasetDict` of the parquet, csv or json files of a data set on ModelScope.

    Args:
        args: only `cache_dir`, `token` and `disable_tqdm` are read.

    Raises:
        MachineError: the package modelscope is not installed.
        DataError: the data set cannot be fetched, or `datasets` cannot read it.
    """
    patterns = ["README.md", f"{config}/*"] if config else []
    return open_folder(str(fetch(name, "dataset", patterns or ["*"], args, DataError)), config, args)


GLUE_NAME = "nyu-mll/glue"
# The commit with <config>/train-00000-of-00001.parquet. It is pinned so that published results keep their rows.
GLUE_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
_WAYS_OUT = (
    "use --data_path FOLDER (GLUE's TSV files, or a saved data set), --sample (generated data), "
    "HF_ENDPOINT=<address of a mirror>, or HF_HUB_OFFLINE=1 and HF_HOME with a cache filled elsewhere"
)


@contextmanager
def _hub_mode(is_offline: bool, is_quiet: bool) -> Iterator[None]:
    """Sets the offline switch of `datasets` and huggingface_hub for one call, without progress bars or warnings.

    The libraries read their environment variables at import, so setting these now would be too late. The download
    counter is off, because it would call an address outside a mirror's network. Progress bars that are switched off
    here stay off.
    """
    import datasets
    import huggingface_hub

    settings = (
        (datasets.config, "HF_HUB_OFFLINE", is_offline),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    verbosity = datasets.logging.get_verbosity()
    for module, name, value in settings:
        setattr(module, name, value)
    datasets.logging.set_verbosity_error()
    if is_quiet:
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        datasets.logging.set_verbosity(verbosity)


_ADDRESSES_FROM = (4, 8)  # version of datasets; before, hf://datasets/NAME is no name of a data set


def hub_address(name: str, version: str) -> str:
    """What `datasets` of a version has to be told so that it reads the hub's data set.

    Raises:
        DataError: this version would read a local path of that name.
    """
    if _major_minor(version) >= _ADDRESSES_FROM:
        return f"hf://datasets/{name}"
    if Path(name).exists():
        raise DataError(
            f"{name}: datasets {version} reads the local {name} instead of the hub's data set; run in another folder, "
            f"install datasets>=4.8, or write --dataset_name ./{name}"
        )
    return name


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def open_hub(name: str, config: str | None, revision: str | None, args: Any) -> Any:
    """A `datasets.DatasetDict` from the hub or its cache.

    The name always means a data set of the hub, even if a local folder has the same name.

    Args:
        revision: the full commit of the data, which the cache must match too. None: the newest.
        args: only `cache_dir`, `token` and `disable_tqdm` are read.

    Raises:
        DataError: the hub does not answer within 5 s and the cache has no copy, the data set is not found or access
            is refused, or its revision differs.
    """
    probe = start_probe()
    import datasets  # slow, so the probe runs meanwhile

    address = hub_address(name, datasets.__version__)
    # Before 4.0 a data set may be a Python script, about which load_dataset asks on the terminal.
    no_scripts = {} if _major_minor(datasets.__version__) >= (4, 0) else {"trust_remote_code": False}
    reason = probe.wait() if probe else "HF_HUB_OFFLINE is set"
    try:
        client.prepare_client()
        with _hub_mode(reason is not None, args.disable_tqdm or not sys.stderr.isatty()):
            found = client.with_retries(
                lambda: datasets.load_dataset(
                    address, config, revision=revision, cache_dir=args.cache_dir, token=args.token, **no_scripts
                )
            )
    except Exception as error:  # the libraries raise some thirty types; each becomes one line
        raise DataError(_refusal(name, config, revision, reason, error, args)) from error
    _check_files(name, config, args)
    for split, dataset in found.items():
        cached = revision_of(dataset)
        if revision and cached and cached != revision:
            raise DataError(
                f"{name} {config} {split}: the cache holds revision {cached}, not the pinned {revision}, and the hub "
                f"{'is not used (' + reason + ')' if reason else 'did not provide it'}; {_WAYS_OUT}"
            )
    return found


def _check_files(name: str, config: str | None, args: Any) -> None:
    """Raises DataError if downloaded files differ from those of the hub.

    The cache of `datasets` holds rows made from these files, so the error names both folders to delete.
    """
    from datasets import config as settings
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "snapshots"
    try:
        client.check(sorted(folder.glob(f"*/{config or '**'}/*.*")))
    except client.DamagedFileError as error:
        rows = Path(args.cache_dir or settings.HF_DATASETS_CACHE) / name.replace("/", "___")
        raise DataError(f"{name} {config or ''}: {error}, and with it {rows}") from error


def _refusal(
    name: str, config: str | None, revision: str | None, reason: str | None, error: Exception, args: Any
) -> str:
    from datasets import config as settings
    from huggingface_hub import constants

    what = " ".join(filter(None, (f"{name}@{revision}" if revision else name, config)))
    first = first_line(error)
    if reason is None:
        text = f"{what}: the hub {constants.ENDPOINT} did not provide it: {first}"
    else:
        cache = args.cache_dir or settings.HF_DATASETS_CACHE
        text = f"{what}: the hub {constants.ENDPOINT} is not used ({reason}) and {cache} has no copy"
    shadowed = f"\nto use the local folder {name}, write --dataset_name ./{name}" if Path(name).is_dir() else ""
    return f"{text}\n{_WAYS_OUT}{shadowed}"


def open_folder(folder: str, config: str | None, args: Any) -> Any:
    """A `datasets.DatasetDict` from a local folder of data files, or one that `save_to_disk` wrote.

    Raises:
        DataError: `datasets` cannot read it.
    """
    _check_kinds(Path(folder))
    import datasets

    try:
        with _hub_mode(True, args.disable_tqdm or not sys.stderr.isatty()):
            if (Path(folder) / "dataset_dict.json").is_file():  # of save_to_disk
                return datasets.load_from_disk(folder)
            if (Path(folder) / "state.json").is_file():
                return datasets.DatasetDict({"train": datasets.load_from_disk(folder)})
            return datasets.load_dataset(folder, config, cache_dir=args.cache_dir)
    except Exception as error:
        why = _first_cause(error)
        raise DataError(f"{folder}: {why}; it has {_what_lies_in(Path(folder))}; {_NAME_FILES}") from error


_NAME_FILES = (
    "name them by --train_file, --validation_file and --test_file, or keep files of one kind and columns there"
)
# Kinds of files that `datasets` reads by the same reader.
_READER_OF = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def _check_kinds(folder: Path) -> None:
    """Raises DataError for data files of several kinds: `datasets` reads one kind and leaves out the rest unsaid."""
    card = folder / "README.md"
    if not folder.is_dir() or (card.is_file() and "configs:" in card.read_text("utf-8", "replace")):
        return  # the folder says itself which files make up which split
    if len({_READER_OF[file.suffix.lower()] for file in _data_files(folder)}) > 1:
        raise DataError(f"{folder}: data files of several kinds: {_what_lies_in(folder)}; {_NAME_FILES}")


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and is_data_file(path))


def _what_lies_in(folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in _data_files(folder)]
    if not names:
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return f"no {', '.join(_READER_OF)} files, but {', '.join(there[:_SHOWN]) or 'nothing'}"
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


_SHOWN = 12


def _first_cause(error: BaseException) -> str:
    """The first line of the exception that all others follow from."""
    from datasets.table import CastError

    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return "its files differ in their columns or types" if isinstance(error, CastError) else first_line(error)


def revision_of(dataset: Any) -> str | None:
    """The commit of a `datasets.Dataset`, from the name of its cache folder. None if unknown."""
    for file in dataset.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch(r"[0-9a-f]{40}", folder):
            return folder
    return None


def to_table(dataset: Any, origin: str) -> Table:
    """Converts a `datasets.Dataset` to a table, with the class names of its ClassLabel columns.

    Raises:
        DataError: the data set has no rows.
    """
    table = from_arrow(dataset.with_format("arrow")[:], origin)
    return replace(table, class_names=class_names_of(dataset.features.to_dict()))


def load_saved(folder: Path) -> Table:
    """Loads a data set that `Dataset.save_to_disk` wrote.

    Raises:
        DataError: the data set is damaged or has no rows.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:
        first = first_line(error)
        raise DataError(f"{folder}: cannot be read as a saved data set: {first}") from error
    return to_table(dataset, str(folder))
