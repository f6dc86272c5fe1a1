"""Fixtures of the fault tests: the job server and the record of what a full run did."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jobs import Server


@pytest.fixture(scope="session")
def server():
    """One job server for all tests of this process."""
    found = Server()
    yield found
    found.close()


@pytest.fixture
def report(request):
    """Takes a line on what was really done; kept in the file named by BERT_GLUE_FAULT_REPORT."""

    def write(line: str) -> None:
        print(line)
        if os.environ.get("BERT_GLUE_FAULT_REPORT"):
            with Path(os.environ["BERT_GLUE_FAULT_REPORT"]).open("a", encoding="utf-8") as file:
                file.write(f"{request.node.nodeid.split('/')[-1]}: {line}\n")

    return write
