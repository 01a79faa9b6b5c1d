"""Calibrates a trained router on held-out examples: temperature and out-of-scope bias."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dlp_edge.models.batches import Windows
from dlp_edge.models.evaluation import Judged, judged

TEMPERATURES = tuple(round(0.5 * 1.05**step, 3) for step in range(40))  # 0.5 to 3.4
MIN_CONFIDENCE = 0.25  # lower than a fusion of three needs
# The out-of-scope bias is raised until this share of out-of-scope texts gets no adapter, while at
# least the shares in KEPT of in-scope held-out text keep theirs. The goal is high because half of
# those texts come from the grammar used in training, unlike out-of-scope text at run time.
OTHERS_GOAL = 0.995
KEPT = {"prompts": 0.997, "bare prompts": 0.988, "chat turns": 0.99, "sentences of two": 0.99}
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
            if kind != "other texts"
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
    for bias in BIASES:
        if any(kept(bias, kind) < least for kind, least in KEPT.items() if kind in scores):
            break
        chosen = bias
        if 1 - kept(bias, "other texts") >= OTHERS_GOAL:
            break
    return chosen


def shifted(scores: Mapping[str, Tensor], bias: float) -> dict[str, Tensor]:
    """Add a bias to the scores of the last row, the out-of-scope row."""
    return {
        kind: torch.cat([z[:, :-1], z[:, -1:] + bias], 1).double() for kind, z in scores.items()
    }


def judge(scores: Tensor, kept: Windows, num_labels: int, temperature: float) -> Judged:
    labels = kept.targets.argmax(1).tolist()
    return judged(scores.numpy(), labels, num_labels, temperature)
