"""What a continued piece of work shares with its beginning: stored keys, old and new, and how differences read."""

from __future__ import annotations

from bert_glue.storage.identity import Fact, differences, flag_facts, with_current_keys

FACTS = (Fact("rows", "training rows"), Fact("seed_of_order", "seed (--data_seed)", "seed of the order"))


def test_keys_of_earlier_versions_are_read_and_those_of_today_come_first():
    assert with_current_keys(FACTS, {"training rows": 5, "seed of the order": 7, "else": 1}) == {
        "rows": 5,
        "seed_of_order": 7,
    }
    assert with_current_keys(FACTS, {"training rows": 5, "rows": 6}) == {"rows": 6}
    assert with_current_keys(flag_facts(["seed"]), {"--seed": 3}) == {"seed": 3}


def test_a_difference_has_its_values_where_they_are_short():
    now = {"rows": "y" * 60, "seed_of_order": 8}
    assert differences(FACTS, {"rows": "x", "seed_of_order": 7}, now) == "training rows; seed (--data_seed) (7, now 8)"
    assert differences(FACTS, {}, {"rows": 1}) == "training rows (None, now 1)"
    assert differences(FACTS, {"rows": 1}, {}) == "training rows (1, now None)"


def test_what_both_lack_or_share_is_no_difference():
    assert differences(FACTS, {"rows": [1, 2], "other": 1}, {"rows": [1, 2], "other": 2}) == ""
