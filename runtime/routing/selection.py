"""Which adapters, and how much of each: the paper's eq. 4 and eq. 5 (arXiv 2410.01497)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.types import WeighRule


def confidence_of(probabilities: Mapping[str, float], doubt: float = 0.0) -> float:
    """The probability that the prompt is in scope and the first adapter right; 0 without any."""
    return (1 - doubt) * max(probabilities.values(), default=0.0)


def select(
    probabilities: Mapping[str, float], rule: SelectionRule, doubt: float = 0.0
) -> tuple[str, ...]:
    """The selected names, most probable first (ties in the mapping's order).

    Empty only when the router abstains: no adapter at all, or less than `rule.min_confidence`.

    Args:
        doubt: the probability that the prompt is out-of-scope.
    """
    ordered = sorted(probabilities, key=lambda name: -probabilities[name])
    if not ordered or confidence_of(probabilities, doubt) < rule.min_confidence:
        return ()
    if rule.select == "top_k":
        return tuple(ordered[: rule.k])
    if rule.select == "threshold":
        kept = tuple(name for name in ordered if probabilities[name] >= rule.p)
        return kept or (ordered[0],)
    nucleus = [ordered[0]]
    # fsum: eight times 0.1 reaches 0.8, which a running sum misses by a rounding error.
    while math.fsum(probabilities[name] for name in nucleus) < rule.p:
        rest = ordered[len(nucleus) :]
        if not rest or probabilities[rest[0]] == 0:  # rounded sums may stay below p = 1
            break
        nucleus.append(rest[0])
    return tuple(nucleus)


def weigh(
    probabilities: Mapping[str, float], selected: tuple[str, ...], rule: WeighRule
) -> dict[str, float]:
    """Fusion weights of the selected adapters; they sum to 1 (eq. 5)."""
    if not selected:
        return {}
    y = np.array([probabilities[name] for name in selected], dtype=np.float64)
    if rule == "softmax":
        y = np.exp(y - y.max())
    return dict(zip(selected, (y / y.sum()).tolist(), strict=True))
