"""What is set on held-out examples when a network is trained: temperature, doubt and the confidence
below which the base model answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dlp_edge.models.batches import Windows
from dlp_edge.models.evaluation import Array, Judged, judged

FOREIGN = ("other texts", "out-of-scope file")  # kinds of text that no task is for
TEMPERATURES = tuple(round(0.5 * 1.05**step, 3) for step in range(40))  # 0.5 to 3.4
MIN_CONFIDENCE = 0.25  # lower than a fusion of three needs
# The out-of-scope bias is raised until this share of out-of-scope texts gets no adapter, while at
# least the shares in KEPT of in-scope held-out text keep theirs. The goal is high because half of
# those texts come from the grammar used in training, unlike out-of-scope text at run time.
OTHERS_GOAL = 0.995
KEPT = {"prompts": 0.997, "bare prompts": 0.988, "chat turns": 0.99, "sentences of two": 0.99}
MOST_LOST = 0.005  # of what is kept without any doubt, where that is less than KEPT
KEPT_SHARES = (0.99, 0.95)  # of the prompts; the first is guaranteed, both are reported
BIASES = tuple(round(-1 + 0.1 * step, 1) for step in range(71))  # -1 to 6


def best_temperature(scores: Mapping[str, Tensor], held_out: Mapping[str, Windows]) -> float:
    """The temperature with the smallest cross-entropy over the adapters; each kind of examples has
    equal weight."""

    def loss(temperature: float) -> float:
        return sum(
            functional.cross_entropy(
                scores[kind][:, :-1] / temperature, held_out[kind].targets[:, :-1]
            ).item()
            for kind in scores
            if kind not in FOREIGN
        )

    return min(TEMPERATURES, key=loss)


def doubt_bias(
    scores: Mapping[str, Tensor],
    held_out: Mapping[str, Windows],
    num_labels: int,
    temperature: float,
) -> float:
    """The smallest bias of the out-of-scope row with which OTHERS_GOAL of out-of-scope texts get
    no adapter, as far as KEPT allows. A larger bias would lower every confidence."""

    def kept(bias: float, kind: str) -> float:
        z = shifted({kind: scores[kind]}, bias)[kind]
        found = judge(z, held_out[kind], num_labels, temperature)
        return float((found.confidence >= MIN_CONFIDENCE).mean())

    chosen = BIASES[0]
    goals = {
        kind: min(least, kept(chosen, kind) - MOST_LOST)
        for kind, least in KEPT.items()
        if kind in scores
    }
    for bias in BIASES:
        if any(kept(bias, kind) < least for kind, least in goals.items()):
            break
        chosen = bias
        if all(1 - kept(bias, kind) >= OTHERS_GOAL for kind in FOREIGN if kind in scores):
            break
    return chosen


@dataclass(frozen=True)
class Threshold:
    """A confidence below which the base model answers.

    Attributes:
        kept: the share of prompts like the dev ones that it keeps, in expectation.
        min_confidence: the threshold; None where there are too few dev prompts to tell.
        to_base: the share of held-out texts that it sends to the base model, by kind of text.
    """

    kept: float
    min_confidence: float | None
    to_base: dict[str, float]


def conformal_threshold(confidence: Array, kept: float) -> float | None:
    """The largest threshold that a new prompt reaches with probability `kept` or more, if it is
    drawn like these n: the k-th smallest of their confidences, k = floor((1 - kept) (n + 1))
    (split conformal prediction; Vovk et al. 2005). None where k is 0."""
    k = int((1 - kept) * (len(confidence) + 1) + 1e-9)
    return float(np.sort(confidence)[k - 1]) if k else None


def thresholds(prompts: Judged, foreign: Mapping[str, Judged]) -> tuple[Threshold, ...]:
    """A threshold for each of KEPT_SHARES, with what it does to text of no task."""
    found = []
    for kept in KEPT_SHARES:
        least = conformal_threshold(prompts.confidence, kept)
        to_base = {
            kind: round(float((each.confidence < (least or 0.0)).mean()), 4)
            for kind, each in foreign.items()
        }
        found.append(Threshold(kept, None if least is None else round(least, 6), to_base))
    return tuple(found)


def least_confidence(prompts: Judged) -> float:
    """The router's `min_confidence`: MIN_CONFIDENCE, or less where that would keep fewer prompts
    than the first of KEPT_SHARES."""
    guaranteed = conformal_threshold(prompts.confidence, KEPT_SHARES[0])
    return MIN_CONFIDENCE if guaranteed is None else min(MIN_CONFIDENCE, guaranteed)


def shifted(scores: Mapping[str, Tensor], bias: float) -> dict[str, Tensor]:
    """Add a bias to the scores of the last row, the out-of-scope row."""
    return {
        kind: torch.cat([z[:, :-1], z[:, -1:] + bias], 1).double() for kind, z in scores.items()
    }


def judge(scores: Tensor, kept: Windows, num_labels: int, temperature: float) -> Judged:
    labels = kept.targets.argmax(1).tolist()
    return judged(scores.numpy(), labels, num_labels, temperature)
