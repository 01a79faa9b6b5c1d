"""Greedy answers of an exported graph to many prompts, for comparing formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlp_edge.runtime.decoding.engine import Engine

PROMPTS = Path(__file__).with_name("prompts.txt")
NEW_TOKENS = 100


def prompts() -> list[str]:
    """Twenty things to ask, none of them in the calibration text."""
    return PROMPTS.read_text(encoding="utf-8").splitlines()


def greedy_answers(engine: Engine, asked: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The `count` most probable tokens, one after the other, after each of the prompts `asked`,
    of the base model; the ends of answers are passed over.

    Args:
        engine: with a sequence for each prompt.
    """
    decoder = engine.decoder
    answers = [[int(decoder.prefill(ids, sequence).argmax())] for sequence, ids in enumerate(asked)]
    for _ in range(count - 1):
        newest = decoder.step([answer[-1] for answer in answers]).argmax(1)
        for answer, token in zip(answers, newest.tolist(), strict=True):
            answer.append(token)
    return answers
