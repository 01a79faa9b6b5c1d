"""A user's text that cannot fit into the context is refused at once, whatever it is made of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlp_edge import ContextLengthError, Runtime

MAX_SECONDS = 0.2


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle, threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("part", ["a", "word ", " ", "\ufdfa", "\U0001f600", "<|end|>", "0", "\n"])
@pytest.mark.parametrize("size", [16_000, 63_000, 10_000_000])
def test_a_long_text(runtime: Runtime, part: str, size: int) -> None:
    text = "x" + part * (size // len(part))
    begun = time.process_time()
    with pytest.raises(ContextLengthError, match="the context holds"):
        runtime.generate(text, max_new_tokens=2)
    with pytest.raises(ContextLengthError, match="the context holds"):
        runtime.score(text, ["yes"])
    assert time.process_time() - begun < 2 * MAX_SECONDS


def test_a_text_of_the_contexts_size_is_answered(runtime: Runtime) -> None:
    assert runtime.generate("a" * 400, max_new_tokens=2).usage.completion_tokens == 2
