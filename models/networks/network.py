"""The base class of router architectures: features, and the last layer over them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class RouterNetwork(nn.Module, ABC):
    """Scores R rows for router inputs
    (`dlp_edge.runtime.routing.router_input.RouterInputEncoder`).

    Attributes:
        separator: the id between the segments of an input.
        head: the last layer, exported as data (`dlp_edge.bundle.router_head`). If it reads fewer
            than F features, it reads the first ones.
        width: F, the number of features.
        settings: of the architecture, if any.
    """

    separator: int
    head: nn.Linear
    width: int
    settings: dict[str, int]

    def forward(
        self, input_ids: Tensor, mask: Tensor, noise: torch.Generator | None = None
    ) -> Tensor:
        """input_ids [B, L] int64, mask [B, L] bool (False is padding) -> scores [B, R]."""
        features = self.features(input_ids, mask, noise)
        scores: Tensor = self.head(features[:, : self.head.in_features])
        return scores

    @abstractmethod
    def features(
        self, input_ids: Tensor, mask: Tensor, noise: torch.Generator | None = None
    ) -> Tensor:
        """Features [B, F] for the last layer; `noise` seeds the dropout in training."""


def dropped(value: Tensor, share: float, noise: torch.Generator | None) -> Tensor:
    """Dropout drawn by `noise`; without it the value as it is."""
    if noise is None:
        return value
    kept = torch.empty_like(value).bernoulli_(1 - share, generator=noise)
    return value * kept / (1 - share)
