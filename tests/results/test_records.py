"""Values of result files have the requested type, or count as absent."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from bert_glue.results.records import Record, as_text, read_record

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def test_a_record_gives_values_of_their_types_only():
    record = Record({"n": 1.5, "b": True, "t": "x", "l": [1, "2"], "o": {"n": "1"}, "huge": 10**400}, "a.json")
    assert record.number("n") == 1.5 and record.number("b") is None and record.number("huge") is None
    assert record.text("t") == "x" and record.text("n", "-") == "-" and record.numbers("l") == []
    assert record.part("o").number("n") is None and record.part("absent").values == {}
    assert record.ignored == ["a.json b", "a.json huge", "a.json n", "a.json l", "a.json o n"]


@settings(max_examples=100, deadline=None)
@given(ANY_JSON)
def test_any_value_is_given_as_its_type_or_not_at_all(value):
    record = Record({"x": value})
    number = record.number("x")
    assert number is None or (isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e309)
    assert isinstance(record.text("x"), str) and isinstance(record.part("x").values, dict)
    for found in (record.records("x"), record.texts("x"), record.numbers("x"), record.table("x", 2)):
        assert isinstance(found, list)
    assert all(len(row) == 2 for row in record.table("x", 2))
    assert isinstance(as_text(value), str)


def test_a_file_that_is_absent_is_empty(tmp_path):
    assert read_record(tmp_path, "run.json").values == {}
    (tmp_path / "run.json").write_text(json.dumps({"a": 1}))
    assert read_record(tmp_path, "run.json").number("a") == 1
