"""Eight threads, 25 requests each, with random cancels."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from dlp_edge import Runtime
from tests.testing.hammer import hammer

PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("Tom has 3 apples and buys 4. How many?", {"max_new_tokens": 40}),
    ("Select the name of row 7", {"max_new_tokens": 30, "kv": "recompute"}),
    ("Write an email to Ann. " * 8, {"adapters": {"email": 0.5}, "max_new_tokens": 20}),
    ("Hello", {"adapters": {}, "max_new_tokens": 25}),
    ("What now?", {"temperature": 1.0, "seed": 5, "max_new_tokens": 40}),
]


@pytest.mark.slow
def test_answers_are_those_of_the_request_alone_and_memory_stays(tiny_bundle: Path) -> None:
    with Runtime(tiny_bundle) as runtime:
        wrong, memory = hammer(runtime, PROMPTS, threads=8, requests=25)
    assert wrong == []
    assert len(memory) == 200
    third, last = mean(memory[100:150]), mean(memory[150:])
    assert last - third < 2_000_000
