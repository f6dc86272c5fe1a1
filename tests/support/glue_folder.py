"""A folder of GLUE's own TSV files with generated rows."""


def write(path, *rows, gap="\t", end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((end.join(gap.join(row) for row in rows) + end).encode())
    return path


def glue_rows(task, split, rows=3):
    """The lines of a GLUE file with the columns the task table names, and some more."""
    tsv = task.tsv[split]
    if not tsv.has_header:
        return [["src", str(row % 2), "", f"{split} text {row} "] for row in range(rows)]
    label = [] if tsv.label is None else [tsv.label]
    value = "2.500" if task.is_regression else task.labels[-1]
    names = ["index", *tsv.texts, "genre", *label]
    return [names] + [
        [str(row), *(f"{split} {name} {row} " for name in tsv.texts), "n/a", *([value] if label else [])]
        for row in range(rows)
    ]


def make_glue(root, task, rows=lambda split: 3):
    for split, tsv in task.tsv.items():
        write(root / task.folder / tsv.file, *glue_rows(task, split, rows(split)))
