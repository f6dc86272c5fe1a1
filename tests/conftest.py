"""Rooms of their own for what a run caches, so that no test reads or fills the user's."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_token_cache(tmp_path_factory):
    """Token tables go to a folder of this session, in child processes too."""
    before = os.environ.get("BERT_GLUE_CACHE")
    os.environ["BERT_GLUE_CACHE"] = str(tmp_path_factory.mktemp("token-cache"))
    yield
    if before is None:
        del os.environ["BERT_GLUE_CACHE"]
    else:
        os.environ["BERT_GLUE_CACHE"] = before


@pytest.fixture(autouse=True)
def own_rank_variables():
    """A test of ranks in this process must not make the next one wait for peers."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
