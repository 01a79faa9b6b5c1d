"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Sampler = Callable[[npt.NDArray[np.floating]], int]


def make_sampler(temperature: float, top_p: float, top_k: int, seed: int | None) -> Sampler:
    """A sampler: logits [V] -> token id.

    temperature 0 is greedy (ties: the lowest id). Otherwise logits / temperature, then the top_k
    largest (0: all), then the smallest set whose probability reaches top_p, renormalised. The
    same seed gives the same tokens for the same logits.
    """
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = np.random.default_rng(seed)

    def sample(logits: npt.NDArray[np.floating]) -> int:
        ids, probabilities = distribution(logits, temperature, top_p, top_k)
        return int(generator.choice(ids, p=probabilities))

    return sample


def distribution(
    logits: npt.NDArray[np.floating], temperature: float, top_p: float, top_k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Candidate ids, most probable first (ties: the lowest id first), and their probabilities
    (float64, summing to 1)."""
    if 0 < top_k < len(logits):
        least = np.partition(logits, -top_k)[-top_k]
        ids = np.flatnonzero(logits >= least)  # more than top_k where several are equal
        ids = ids[np.argsort(-logits[ids], kind="stable")][:top_k]
    else:
        ids = np.argsort(-logits, kind="stable")
    best = logits[ids[0]].astype(np.float64)
    with np.errstate(over="ignore"):  # -inf is right for a temperature near 0
        probabilities = np.exp((logits[ids].astype(np.float64) - best) / temperature)
    probabilities /= probabilities.sum()
    if top_p < 1:
        kept = int(np.searchsorted(probabilities.cumsum(), top_p)) + 1
        ids, probabilities = ids[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return ids, probabilities
