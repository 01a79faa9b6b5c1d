"""Which adapters, and how much of each: the paper's eq. 4 and eq. 5 (arXiv 2410.01497)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np

from dlp_edge.errors import UsageError
from dlp_edge.types import SelectRule, WeighRule


def check_number(name: str, value: object, whole: bool = False) -> None:
    """Raises UsageError unless the value is a finite number (a whole one, where asked)."""
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not _is_finite(value):
        raise UsageError(f"{name} is {value!r}", f"Give a {'whole' if whole else 'finite'} number")


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


@dataclass(frozen=True)
class SelectionRule:
    """How router probabilities become fusion weights.

    Attributes:
        select: `nucleus` keeps the most probable adapters up to and including the one that
            brings their sum to p (the authors' code); `threshold` keeps every y_r >= p, or the
            largest if none is (eq. 4 as printed); `top_k` keeps the k largest.
        weigh: `softmax` over the selected probabilities (eq. 5) or `renormalise` (y_r / sum).
        min_confidence: below this largest probability nothing is selected and the base model
            answers.
    """

    select: SelectRule = "nucleus"
    p: float = 0.6
    k: int = 2
    weigh: WeighRule = "softmax"
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.select not in get_args(SelectRule):
            raise UsageError(
                f"unknown selection rule {self.select!r}",
                f"Use one of {', '.join(get_args(SelectRule))}",
            )
        if self.weigh not in get_args(WeighRule):
            raise UsageError(
                f"unknown weighing {self.weigh!r}",
                f"Use one of {', '.join(get_args(WeighRule))}",
            )
        check_number("p", self.p)
        check_number("k", self.k, whole=True)
        check_number("min_confidence", self.min_confidence)
        if not 0 < self.p <= 1:
            raise UsageError(f"p is {self.p}", "Choose 0 < p <= 1")
        if self.k < 1:
            raise UsageError(f"k is {self.k}", "Choose k >= 1")
        if not 0 <= self.min_confidence <= 1:
            raise UsageError(
                f"min_confidence is {self.min_confidence}", "Choose 0 <= min_confidence <= 1"
            )


def select(probabilities: Mapping[str, float], rule: SelectionRule) -> tuple[str, ...]:
    """The selected names, most probable first (ties in the mapping's order).

    Empty only when the router abstains: no adapter at all, or none confident enough.
    """
    ordered = sorted(probabilities, key=lambda name: -probabilities[name])
    if not ordered or probabilities[ordered[0]] < rule.min_confidence:
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
