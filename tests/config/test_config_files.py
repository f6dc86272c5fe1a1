"""Config files of somebody else: read in bounded time and memory, or refused in one line."""

from __future__ import annotations

import json
import os
import time

import pytest

from bert_glue.config.files import read_config
from bert_glue.errors import UsageError

BOMBS = {
    "doubling.yaml": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
    "deep.yaml": "[" * 200_000,
    "deep.json": '{"a":' * 40_000,
    "long.yaml": "seed: 1\n" * 100_000,
    "many.json": json.dumps({f"key{n}": 1 for n in range(10_000)}),
    "tag.yaml": "seed: !!python/object/apply:os.system [exit]\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_goes_off_nowhere(tmp_path, name):
    (tmp_path / name).write_text(BOMBS[name])
    began = time.process_time()
    try:
        assert len(read_config(str(tmp_path / name))) <= 60
    except UsageError as error:
        assert str(error).count("\n") == 0 and len(str(error)) < 1000
    assert time.process_time() - began < 5


def test_a_pipe_is_no_config_file(tmp_path):
    os.mkfifo(tmp_path / "settings.json")
    with pytest.raises(UsageError, match="a pipe"):
        read_config(str(tmp_path / "settings.json"))
