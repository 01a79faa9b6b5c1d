"""Fusions as another server knows them: weights on a grid, and one name for each.

`sql@0.60+email@0.40` is 0.6 sql and 0.4 email, the heaviest first, equal ones by name; `sql` alone
is the skill at weight 1, and `base` the base model. On the grid there is a bounded number of names,
so the server builds, loads and caches each fusion once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dlp_edge.errors import UsageError

GRID = 20  # weights are twentieths
LARGEST_WEIGHT = 2.0
BASE = "base"


def on_grid(weights: Mapping[str, float], max_skills: int) -> dict[str, float]:
    """The weights rounded to the grid, such that their sum stays what it was.

    Args:
        max_skills: the heaviest are kept, and share the sum of all.

    Raises:
        UsageError: a weight is negative or above LARGEST_WEIGHT.
    """
    for name, weight in weights.items():
        if not 0 <= weight <= LARGEST_WEIGHT:
            raise UsageError(
                f"the weight of {name} is {weight}", f"Choose 0 to {LARGEST_WEIGHT:g} here"
            )
    kept = sorted(weights.items(), key=lambda item: (-item[1], item[0]))[:max_skills]
    total, sum_kept = sum(weights.values()), sum(weight for _, weight in kept)
    if not sum_kept:
        return {}
    exact = {name: weight * total / sum_kept * GRID for name, weight in kept}
    steps = {name: math.floor(weight + 1e-9) for name, weight in exact.items()}
    missing = round(sum(exact.values())) - sum(steps.values())
    # The largest remainders are rounded up; sorting is stable, so equal ones go to the heavier.
    for name in sorted(steps, key=lambda name: steps[name] - exact[name])[:missing]:
        steps[name] += 1
    return {name: count / GRID for name, count in steps.items() if count}


def name_of(weights: Mapping[str, float]) -> str:
    """The name of a fusion whose weights are on the grid."""
    if not weights:
        return BASE
    ordered = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) == 1 and ordered[0][1] == 1:
        return ordered[0][0]
    return "+".join(f"{name}@{weight:.2f}" for name, weight in ordered)
