"""Property-based tests as the fault tests run them: 100 examples in the gate, 2,000 in the slow form."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings

EXAMPLES = pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
# Other examples than those of every day: the number is in the report of a failure.
SEED = int(os.environ.get("BERT_GLUE_FUZZ_SEED", "0"))


def hypothesis_test(examples: int, *strategies: Any) -> Callable[[Callable], None]:
    """Decorates a function of one value of each strategy, and runs it with `examples` of them."""

    def decorate(function: Callable) -> None:
        print(f"BERT_GLUE_FUZZ_SEED={SEED}")
        settings(max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck))(
            seed(SEED)(given(*strategies)(function))
        )()

    return decorate
