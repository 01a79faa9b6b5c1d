"""Greedy answers of an exported graph to many prompts, for comparing formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlp_edge.runtime.decoding.engine import Engine

PROMPTS = Path(__file__).with_name("prompts.txt")
NEW_TOKENS = 100


def prompts() -> list[str]:
    """Twenty prompts that do not occur in the calibration text."""
    return PROMPTS.read_text(encoding="utf-8").splitlines()


def greedy_answers(engine: Engine, asked: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy answers of the base model to the prompts, as a batch; EOS does not end them.

    Args:
        engine: with one sequence per prompt.
        asked: token ids of the prompts.
        count: new tokens per answer.
    """
    decoder = engine.decoder
    answers = [[int(decoder.prefill(ids, sequence).argmax())] for sequence, ids in enumerate(asked)]
    for _ in range(count - 1):
        newest = decoder.step([answer[-1] for answer in answers]).argmax(1)
        for answer, token in zip(answers, newest.tolist(), strict=True):
            answer.append(token)
    return answers
