"""How likely given answers are: their tokens are fed, not sampled (teacher forcing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dlp_edge.errors import UsageError
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.decoding.sampling import log_probabilities

SCORE_CHUNK = 64  # tokens a pass, since each brings logits over the whole vocabulary


def log_likelihoods(
    engine: Engine,
    prompt: Sequence[int],
    wholes: Sequence[Sequence[int]],
    fusion: Mapping[str, float],
    ends: Sequence[int],
) -> list[tuple[float, int]]:
    """log p(tokens after the prompt | prompt), summed, and how many those are, for each text.

    Args:
        prompt: its ids, prefilled once.
        wholes: the ids of the prompt and each text together. Where a tokenizer draws the prompt's
            last token and the text's first into one, what is scored begins there.
        ends: ids of which one must follow the text, as part of it; none: what follows is open.

    Raises:
        UsageError: a text has no tokens.
    """
    decoder = engine.decoder
    engine.fuse(fusion)
    decoder.truncate(0)
    found = []
    for whole in wholes:
        first = max(1, _common(prompt, whole))
        if first == len(whole):
            raise UsageError("a continuation has no tokens", "Give it some text")
        # The token before the text is fed again: its logits are wanted.
        known = decoder.reuse(whole[: first - 1])
        if known < first - 1:
            decoder.prefill(whole[known : first - 1])
        fed = whole[first - 1 :] if ends else whole[first - 1 : -1]
        targets = [[token] for token in whole[first:]] + ([list(ends)] if ends else [])
        total = 0.0
        size = min(SCORE_CHUNK, decoder.longest_pass)
        for at in range(0, len(fed), size):
            rows = decoder.all_logits(fed[at : at + size])
            for row, ids in zip(rows, targets[at : at + size], strict=True):
                total += float(np.logaddexp.reduce(log_probabilities(row)[ids]))
        found.append((total, len(whole) - first))
    return found


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """The length of what two lists begin with together."""
    pairs = zip(one, two, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))
