"""The request splitter's network: dilated convolutions over the tokens of a whole prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlp_edge.models.networks.network import dropped
from dlp_edge.runtime.routing.request_splitter import SEGMENT_KINDS, TOKEN_SCORES
from dlp_edge.runtime.routing.splitter_input import GAPS

EMBEDDING = 128
WIDTH = 128  # channels
DILATIONS = (1, 2, 4, 8, 16, 32, 64, 128)  # a token sees 255 to each side
DROPOUT = 0.1


class SplitterNetwork(nn.Module):
    """Scores every token of a prompt.

    Args:
        vocab_size: V, the tokenizer's ids.
        num_tasks: N.

    S = N + SEGMENT_KINDS + TOKEN_SCORES; see `dlp_edge.runtime.routing.request_splitter`.
    """

    def __init__(self, vocab_size: int, num_tasks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, EMBEDDING)
        self.gaps = nn.Embedding(GAPS, WIDTH)
        self.entry = nn.Linear(EMBEDDING, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in DILATIONS)
        self.layers = nn.ModuleList(nn.Linear(3 * WIDTH, WIDTH) for _ in DILATIONS)
        self.last = nn.Linear(WIDTH, num_tasks + SEGMENT_KINDS + TOKEN_SCORES)

    def forward(
        self, ids: Tensor, gaps: Tensor, mask: Tensor, noise: torch.Generator | None = None
    ) -> Tensor:
        """ids, gaps [B, L] int64, mask [B, L] float32 (0 is padding) -> scores [B, L, S]; `noise`
        draws the dropout of training."""
        inside = mask.unsqueeze(2)
        value = self.entry(self.embedding(ids)) + self.gaps(gaps)
        for dilation, norm, layer in zip(DILATIONS, self.norms, self.layers, strict=True):
            # As a matrix product: torch's dilated convolutions take a hundred times as long.
            padded = functional.pad(norm(value) * inside, (0, 0, dilation, dilation))
            length = value.shape[1]
            around = [padded[:, at : at + length] for at in (0, dilation, 2 * dilation)]
            value = value + dropped(torch.relu(layer(torch.cat(around, 2))), DROPOUT, noise)
        scores: Tensor = self.last(value)
        return scores
