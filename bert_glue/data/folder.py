"""What lies in `--data_path`: saved data sets, data files, or GLUE's own TSV folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bert_glue.data.readers import DATA_SUFFIXES, BrokenRowsError, header_of, is_data_file, read_table, read_tsv
from bert_glue.data.splits import LABEL, Split, join_splits, make_split
from bert_glue.data.tables import Table
from bert_glue.errors import DataError
from bert_glue.tasks import GlueTask, TsvFile


@dataclass(frozen=True)
class Layout:
    """One way to lay out a task's splits.

    Args:
        name: as shown to the user.
        find: (task, root, split) -> its files or folders, in order; [] where there is none.
        read: (task, split, path, drop_broken) -> its rows, in the task's own column names; see `read_table`.
        looks_like: the files that it expects, for the error if nothing was found.
    """

    name: str
    find: Callable[[GlueTask, Path, str], list[Path]]
    read: Callable[[GlueTask, str, Path, bool], Table]
    looks_like: str


def _split_names(split: str) -> tuple[str, ...]:
    """Names a folder or file of the split may have; GLUE itself says dev."""
    return tuple(dict.fromkeys((split, split.replace("validation", "dev"))))


def _find_saved(task: GlueTask, root: Path, split: str) -> list[Path]:
    # A saved DatasetDict is one folder a split too, with dataset_dict.json beside them.
    folders = (root / name for name in _split_names(split))
    return [folder for folder in folders if (folder / "state.json").is_file()][:1]


def _read_saved(task: GlueTask, split: str, path: Path, drop_broken: bool) -> Table:
    from bert_glue.data.hub_datasets import load_saved

    return load_saved(path)


def _one_kind(place: Path, files: Iterable[Path]) -> list[Path]:
    found = sorted(files)
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) > 1:
        # Most likely the same rows twice; reading both would train on each row twice.
        raise DataError(f"{place}: has {' and '.join(kinds)} files for one split; keep one kind")
    return found


def _find_files(task: GlueTask, root: Path, split: str) -> list[Path]:
    for name in _split_names(split):
        inside = [path for path in (root / name).glob("*") if is_data_file(path)]
        beside = [root / f"{name}{suffix}" for suffix in DATA_SUFFIXES]
        beside = [path for path in beside if path.is_file() and not _is_glue_file(task, split, path)]
        # The hub keeps a data set's files beside each other or in data/.
        shards = _shards(root, name) or _shards(root / "data", name)
        if found := inside or [*beside, *shards]:
            return _one_kind(root / name, found)
    return []


# train-00000-of-00001.parquet; older repositories have a hash behind the numbers.
_SHARD = r"-(\d+)-of-(\d+)(-[0-9a-f]+)?\.\w+"


def _shards(folder: Path, name: str) -> list[Path]:
    """The numbered files of a split, named as on the hub.

    Raises:
        DataError: a file is missing or occurs twice. Rows would silently be missing, or count twice.
    """
    files: dict[Path, re.Match] = {}
    for path in folder.glob(f"{name}-*"):
        match = re.fullmatch(name + _SHARD, path.name)
        if match and is_data_file(path):
            files[path] = match
    numbers = sorted(int(match[1]) for match in files.values())
    totals = {int(match[2]) for match in files.values()}
    if files and (len(totals) > 1 or numbers != list(range(*totals))):
        there = ", ".join(sorted(path.name for path in files))
        raise DataError(
            f"{folder}: the files of {name} are not one each of {max(totals)}: {there}; fetch the folder again"
        )
    return list(files)


def _read_file(task: GlueTask, split: str, path: Path, drop_broken: bool) -> Table:
    return read_table(path, drop_broken)


def _is_glue_file(task: GlueTask, split: str, path: Path) -> bool:
    """Whether `train.tsv` has GLUE's columns, not the hub's; decided by its header."""
    tsv = task.tsv.get(split)
    if tsv is None or path.name != tsv.file:
        return False
    header = header_of(path)
    plain = {*task.columns, *((LABEL,) if tsv.label is not None else ())}
    return not plain <= set(header) or (tsv.has_header and _tsv_columns(tsv) <= set(header))


def _tsv_columns(tsv: TsvFile) -> set[str | int]:
    return {*tsv.texts, *(() if tsv.label is None else (tsv.label,))}


def _find_glue(task: GlueTask, root: Path, split: str) -> list[Path]:
    path = root / task.tsv[split].file
    return [path] if path.is_file() else []


def _read_glue(task: GlueTask, split: str, path: Path, drop_broken: bool) -> Table:
    tsv = task.tsv[split]
    names = dict(zip(tsv.texts, task.columns, strict=True))
    if tsv.label is not None:
        names[tsv.label] = LABEL
    try:
        table = read_tsv(path, tsv.has_header, _tsv_columns(tsv), drop_broken)
    except BrokenRowsError as error:
        raise DataError(f"{error}\n{path}: {_BROKEN_IN_GLUE}") from None
    return table.renamed(names)


_BROKEN_IN_GLUE = (
    "rows broken by a line end inside a text are known from GLUE's first archive of QQP; `datasets` and nyu-mll/glue "
    "leave them out, and so does --drop_broken_rows, but for test data; or take GLUE's newer archive (QQP-clean)"
)


# In the order in which they are tried.
LAYOUTS = (
    Layout("saved data sets", _find_saved, _read_saved, "train/ validation/ test/ saved by datasets"),
    Layout(
        "data files",
        _find_files,
        _read_file,
        f"the same folders, or files such as train-00000-of-00001.parquet, of {' '.join(DATA_SUFFIXES)}",
    ),
    Layout("GLUE TSV folder", _find_glue, _read_glue, "GLUE's own files, such as train.tsv and dev.tsv"),
)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def is_folder_of(task: GlueTask, folder: Path) -> bool:
    """Whether a folder is named for the task: MRPC, mrpc, STS-B, stsb, sts-b."""
    return _plain(folder.name) in (_plain(task.name), _plain(task.folder))


def roots_of(task: GlueTask, folder: Path) -> list[Path]:
    """The sub-folders of `folder` that are named for the task.

    Raises:
        DataError: `folder` is no folder or cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and is_folder_of(task, path))
    except OSError as error:
        raise DataError(f"--data_path {folder}: cannot be read: {error.strerror}") from None


def detect(task: GlueTask, roots: list[Path]) -> tuple[Layout, Path] | None:
    """The first layout with a split of the task, and its root."""
    for layout in LAYOUTS:
        for root in roots:
            if any(layout.find(task, root, split) for split in task.splits):
                return layout, root
    return None


def read_folder(
    task: GlueTask, layout: Layout, root: Path, splits: Iterable[str], drop_broken: bool = False
) -> tuple[dict[str, Split], list[str]]:
    """Splits of a detected layout, and notes on rows that were left out.

    Args:
        drop_broken: see `read_table`; test data is never shortened, as its predictions are known by their number.

    Raises:
        DataError: a split is not there, or a file is broken.
    """
    found = {split: layout.find(task, root, split) for split in splits}
    missing = [split for split, paths in found.items() if not paths]
    if missing:
        there = [split for split in task.splits if layout.find(task, root, split)]
        raise DataError(f"{root} ({layout.name}): no {', '.join(missing)}; splits there: {', '.join(there)}")
    labelled = {"train", *(split for split, _, _ in task.evaluation)}
    rows, notes = {}, []
    for split, paths in found.items():
        is_labelled = split in labelled
        tables = [layout.read(task, split, path, drop_broken and is_labelled) for path in paths]
        rows[split] = join_splits([make_split(task, split, table, is_labelled) for table in tables])
        for table in tables:
            notes += table.notes
    return rows, notes


def expected() -> str:
    """What a data folder may look like, for an error message."""
    return "; ".join(f"{layout.name}: {layout.looks_like}" for layout in LAYOUTS)
