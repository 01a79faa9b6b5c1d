"""How large fusions can get, and what vLLM has to be told of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlp_edge.bundle.adapter_stack import LoraPair
from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.errors import AdapterError

ALLOWED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's --max-lora-rank
MOST_SKILLS = 8  # of a fusion; more of them hardly differ from their mean
# Fusions that one batch may mix, and those that are kept in memory beside it.
MAX_LORAS, MAX_CPU_LORAS = 8, 64
HALF = 2  # bytes of a number


@dataclass(frozen=True)
class Capacity:
    """The largest fusions of a set of skills.

    Attributes:
        max_skills: the most skills of a fusion.
        max_rank: the largest sum of their ranks.
        lora_rank: that, rounded up to a rank that vLLM has kernels for.
        lora_bytes: of a fusion of that rank in half precision.
    """

    max_skills: int
    max_rank: int
    lora_rank: int
    lora_bytes: int


def capacity_of(
    ranks: Sequence[int],
    rule: SelectionRule | None,
    skills: Mapping[str, Mapping[str, LoraPair]],
) -> Capacity:
    """The capacity that the skills need.

    Args:
        ranks: each skill's largest.
        rule: the router's; None lets an application pin as many skills as fit.

    Raises:
        AdapterError: a single skill has a larger rank than vLLM takes, or there is none.
    """
    largest_first = sorted(ranks, reverse=True)
    if not largest_first or largest_first[0] > ALLOWED_RANKS[-1]:
        raise AdapterError(
            f"the largest rank is {max(ranks, default=0)}",
            f"Give at least one adapter, and none above rank {ALLOWED_RANKS[-1]}",
        )
    most = len(ranks) if rule is None else most_selected(rule, len(ranks))
    most = min(most, MOST_SKILLS, len(ranks))
    while sum(largest_first[:most]) > ALLOWED_RANKS[-1]:
        most -= 1
    rank = sum(largest_first[:most])
    lora_rank = next(allowed for allowed in ALLOWED_RANKS if allowed >= rank)
    widths = {
        module: pair.a.shape[1] + pair.b.shape[1]
        for pairs in skills.values()
        for module, pair in pairs.items()
    }
    return Capacity(most, rank, lora_rank, HALF * lora_rank * sum(widths.values()))


def most_selected(rule: SelectionRule, labels: int) -> int:
    """The most of so many labels that a rule can select, whatever the probabilities are."""
    if rule.select == "top_k":
        return min(rule.k, labels)
    if rule.select == "threshold":
        return min(max(1, math.floor(1 / rule.p)), labels)
    return math.ceil(rule.p * labels)  # all are equally likely
