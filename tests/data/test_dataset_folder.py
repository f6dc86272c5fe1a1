"""`--dataset_name ./FOLDER`: all rows of the folder are read, or the error lists its files and the way out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bert_glue.config.arguments import Arguments
from bert_glue.data.hub_datasets import open_folder
from bert_glue.errors import DataError


def write(path: Path, rows: int = 4, columns: tuple[str, ...] = ("text", "label")) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [dict.fromkeys(columns, f"a {at}") for at in range(rows)]
    if path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(found).to_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(found)


@pytest.mark.parametrize(
    "names",
    [
        ("a.csv", "b.jsonl"),  # `datasets` would read one of them and leave out the other
        ("train.csv", "validation.parquet"),
        ("data/train.jsonl", "data/test.csv"),
        ("train.parquet", "train.csv"),
    ],
)
def test_files_of_several_kinds_are_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / name)
    (tmp_path / "dataset_infos.json").write_text("{}")
    with pytest.raises(DataError) as error:
        open_folder(str(tmp_path), None, Arguments(disable_tqdm=True))
    text = str(error.value)
    assert f"data files of several kinds: {', '.join(sorted(names))}; name them by --train_file" in text
    assert "\n" not in text and "dataset_infos" not in text


def test_files_of_other_columns_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    write(tmp_path / "test.csv", columns=("id", "body", "more"))
    with pytest.raises(
        DataError, match="files differ in their columns or types; it has test.csv, train.csv; name them"
    ):
        open_folder(str(tmp_path), None, Arguments(disable_tqdm=True, cache_dir=str(tmp_path / "cache")))


def test_a_folder_without_data_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_text("x")
    with pytest.raises(DataError, match=r"it has no \.csv, .* files, but notes.docx; name them"):
        open_folder(str(tmp_path), None, Arguments(disable_tqdm=True))


def test_one_kind_of_file_is_read_whole(tmp_path: Path) -> None:
    write(tmp_path / "train.json", 5)
    write(tmp_path / "validation.jsonl", 3)
    args = Arguments(disable_tqdm=True, cache_dir=str(tmp_path / "cache"))
    assert open_folder(str(tmp_path), None, args).num_rows == {"train": 5, "validation": 3}


@pytest.mark.parametrize("is_dict", [True, False])
def test_what_save_to_disk_wrote_is_read(tmp_path: Path, is_dict: bool) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    (DatasetDict({"train": rows}) if is_dict else rows).save_to_disk(tmp_path / "saved")
    assert open_folder(str(tmp_path / "saved"), None, Arguments(disable_tqdm=True))["train"]["text"][:] == ["a", "b"]
