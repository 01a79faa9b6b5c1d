"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Sampler = Callable[[npt.NDArray[np.floating]], int]


def make_sampler(
    temperature: float, top_p: float, top_k: int, seed: int | None, min_p: float = 0.0
) -> Sampler:
    """A sampler: logits [V] -> token id.

    temperature 0 is greedy (ties: the lowest id). Otherwise logits / temperature, then the top_k
    largest (0: all), then the smallest set whose probability reaches top_p, then those at least
    min_p times as probable as the first, renormalised. The same seed gives the same tokens for
    the same logits.
    """
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = np.random.default_rng(seed)

    def sample(logits: npt.NDArray[np.floating]) -> int:
        ids, probabilities = distribution(logits, temperature, top_p, top_k, min_p)
        return int(generator.choice(ids, p=probabilities))

    return sample


def distribution(
    logits: npt.NDArray[np.floating],
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float = 0.0,
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
    if min_p > 0:
        kept = int((probabilities >= min_p * probabilities[0]).sum())
        ids, probabilities = ids[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return ids, probabilities


def penalise(
    logits: npt.NDArray[np.floating], seen: npt.NDArray[np.bool_], penalty: float
) -> npt.NDArray[np.floating]:
    """The logits [V] with those of the tokens seen [V] made less likely: divided by the penalty
    where positive, multiplied where negative (CTRL, arXiv 1909.05858; as transformers does)."""
    changed = np.where(logits > 0, logits / penalty, logits * penalty)
    return np.where(seen, changed, logits).astype(logits.dtype, copy=False)


def log_probabilities(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """log softmax of logits [V]."""
    shifted = logits.astype(np.float64) - logits.max()
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
