"""`--validation_split_percentage`: holds out that share of each class by the seed, and the log states it."""

from collections import Counter

import pytest

from bert_glue.config.arguments import Arguments
from bert_glue.config.parser import parse
from bert_glue.data.sources import load_task_data
from bert_glue.errors import DataError, UsageError

BOTH = frozenset({"train", "evaluation"})


def table(path, counts, text="text {}"):
    """A csv with so many rows of each class."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    path.write_text("text,label\n" + "".join(f"{text.format(i)},{label}\n" for i, label in enumerate(labels)))
    return str(path)


def load(path, percentage, **flags):
    return load_task_data(Arguments(train_file=path, validation_split_percentage=percentage, **flags), BOTH)


@pytest.mark.parametrize(
    ("counts", "percentage", "held_out"),
    [
        ({"a": 80, "b": 20}, 10, {"a": 8, "b": 2}),
        ({"a": 30, "b": 30, "c": 30}, 20, {"a": 6, "b": 6, "c": 6}),
        ({"a": 50, "b": 10, "c": 1}, 20, {"a": 10, "b": 2}),
        ({"1.5": 10, "2.5": 10}, 25, 5),
    ],
)
def test_each_class_gives_its_share(tmp_path, counts, percentage, held_out):
    data = load(table(tmp_path / "a.csv", counts), percentage)
    train, validation = data.splits["train"], data.splits["validation"]
    if isinstance(held_out, int):
        assert len(validation) == held_out
    else:
        names = Counter(data.task.labels[label] for label in validation.labels)
        assert names == held_out
    assert sorted(train.texts[0] + validation.texts[0]) == sorted(f"text {i}" for i in range(sum(counts.values())))
    assert any(f"{len(validation)} of {sum(counts.values())} training rows are held out" in w for w in data.warnings)


def test_the_seed_of_the_order_chooses(tmp_path):
    path = table(tmp_path / "a.csv", {"a": 40, "b": 40})
    chosen = [load(path, 20, **flags).splits["validation"].texts for flags in ({}, {"seed": 42}, {"data_seed": 7})]
    assert chosen[0] == chosen[1] != chosen[2]


def test_texts_on_both_sides_are_told(tmp_path):
    data = load(table(tmp_path / "a.csv", {"a": 20, "b": 20}, text="the same"), 10)
    assert any("warning: 4 of them have the same text as a training row" in line for line in data.warnings)


def test_no_row_at_all_is_refused(tmp_path):
    with pytest.raises(DataError, match="--validation_split_percentage 1 of 8 rows holds out no row"):
        load(table(tmp_path / "a.csv", {"a": 4, "b": 4}), 1)


@pytest.mark.parametrize(
    "flags", ["--train_file a.csv --validation_file b.csv", "--task_name rte", "--train_file a.csv --seed 1 --do_eval"]
)
def test_where_it_goes(flags):
    line = f"--model_name_or_path m --do_train --output_dir o --validation_split_percentage 10 {flags}".split()
    if "--seed" in line:
        assert parse(line).validation_split_percentage == 10
    else:
        with pytest.raises(UsageError, match="--validation_split_percentage"):
            parse(line)
