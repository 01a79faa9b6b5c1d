"""What is set on held-out examples when a network is trained: temperature and doubt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dlp_edge.models.batches import Windows
from dlp_edge.models.evaluation import Judged, judged

TEMPERATURES = tuple(round(0.5 * 1.05**step, 3) for step in range(40))  # 0.5 to 3.4
MIN_CONFIDENCE = 0.25  # below what a blend of three asks for
# Doubt is set so that this share of other texts gets no adapter, as long as these shares of the
# tasks' own held-out text keep theirs. The goal is high: half of those texts come from a grammar
# that training knows, while foreign text at run time does not.
OTHERS_GOAL = 0.995
KEPT = {"prompts": 0.997, "bare prompts": 0.988, "chat turns": 0.99, "sentences of two": 0.99}
MOST_LOST = 0.005  # of what is kept without any doubt, where that is less than KEPT
BIASES = tuple(round(-1 + 0.1 * step, 1) for step in range(71))  # -1 to 6


def best_temperature(scores: Mapping[str, Tensor], held_out: Mapping[str, Windows]) -> float:
    """The one with the smallest loss among the adapters, every kind of examples counting the
    same."""

    def loss(temperature: float) -> float:
        return sum(
            functional.cross_entropy(
                scores[kind][:, :-1] / temperature, held_out[kind].targets[:, :-1]
            ).item()
            for kind in scores
            if kind != "other texts"
        )

    return min(TEMPERATURES, key=loss)


def doubt_bias(
    scores: Mapping[str, Tensor],
    held_out: Mapping[str, Windows],
    num_labels: int,
    temperature: float,
) -> float:
    """What nobody's row needs so that OTHERS_GOAL of the held-out other texts get no adapter, as
    far as the shares of KEPT allow; no more than that, since it takes from every confidence."""

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
        if 1 - kept(bias, "other texts") >= OTHERS_GOAL:
            break
    return chosen


def shifted(scores: Mapping[str, Tensor], bias: float) -> dict[str, Tensor]:
    """Scores with a bias more on the last row, nobody's."""
    return {
        kind: torch.cat([z[:, :-1], z[:, -1:] + bias], 1).double() for kind, z in scores.items()
    }


def judge(scores: Tensor, kept: Windows, num_labels: int, temperature: float) -> Judged:
    labels = kept.targets.argmax(1).tolist()
    return judged(scores.numpy(), labels, num_labels, temperature)
