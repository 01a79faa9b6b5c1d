"""The names of fusions: `sql@0.60+email@0.40` is 0.6 sql and 0.4 email, `sql` the skill alone.

A fusion has one name: weights are twentieths, the heaviest skill comes first, equal ones go by
name. So it is built, loaded and cached once, and its prefix cache is one.
"""

from __future__ import annotations

import re
from collections.abc import Collection

GRID = 20
LARGEST = 2 * GRID  # the largest weight is 2
MOST_SKILLS = 64
_PART = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})@(\d)\.(\d\d)", re.ASCII)


def parse(name: str, known: Collection[str]) -> dict[str, int] | None:
    """The skills of a fusion and their weights in twentieths; None unless it is its one name."""
    if name in known:
        return {name: GRID}
    parts = name.split("+")
    if len(parts) > MOST_SKILLS:
        return None
    weights: dict[str, int] = {}
    for part in parts:
        match = _PART.fullmatch(part)
        if match is None or match[1] not in known or match[1] in weights:
            return None
        hundredths = 100 * int(match[2]) + int(match[3])
        steps, rest = divmod(hundredths * GRID, 100)
        if rest or not 0 < steps <= LARGEST:
            return None
        weights[match[1]] = steps
    return weights if format_name(weights) == name else None


def format_name(weights: dict[str, int]) -> str:
    """The one name of a fusion."""
    if len(weights) == 1 and GRID in weights.values():
        return next(iter(weights))
    ordered = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    return "+".join(f"{skill}@{steps / GRID:.2f}" for skill, steps in ordered)
