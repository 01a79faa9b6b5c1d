"""What a sampler has to draw from, computed plainly: everything sorted, in double precision."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


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
