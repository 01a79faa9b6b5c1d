"""The mini-MLP router: pooled embeddings and four linear layers (DLP-LoRA, arXiv 2410.01497).

The paper pools the whole context as one bag of tokens. At a sentence start that cannot tell what
has been asked from what is being written, so the pooling scales each segment of the window on
its own, dimension by dimension: 1,536 parameters more, the same 256 values for the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlp_edge.runtime.router import SEGMENTS

EMBEDDING = 128
HIDDEN = (512, 1024, 512)
DROPOUT = 0.1
MASKED = -1e4  # added to what the maximum must not see


class RouterMLP(nn.Module):
    """Scores N labels for windows of token ids (`dlp_edge.runtime.router.WindowReader`).

    Args:
        vocab_size: the tokenizer's ids and, last, the separator between segments.
        num_labels: N.
    """

    def __init__(self, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.separator = vocab_size - 1
        self.embedding = nn.Embedding(vocab_size, EMBEDDING)
        self.mean_scale = nn.Parameter(torch.rand(SEGMENTS, EMBEDDING))
        self.max_scale = nn.Parameter(torch.rand(SEGMENTS, EMBEDDING))
        self.max_shift = nn.Parameter(torch.randn(SEGMENTS, EMBEDDING) * 0.5)
        layers: list[nn.Module] = []
        width = 2 * EMBEDDING
        for hidden in HIDDEN:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(DROPOUT)]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_labels))

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """input_ids [B, L] int64, mask [B, L] bool (False is padding) -> logits [B, N]."""
        logits: Tensor = self.layers(self.pool(input_ids, mask))
        return logits

    def pool(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """[B, 256]: the scaled means of the segments, added up, and one maximum over all of
        the scaled and shifted tokens."""
        segment = ((input_ids == self.separator) & mask).long().cumsum(1)
        member = nn.functional.one_hot(segment, SEGMENTS) * mask.unsqueeze(-1)
        members = member.to(self.mean_scale.dtype)  # [B, L, S]
        tokens = self.embedding(input_ids)  # [B, L, 128]
        share = members / members.sum(1, keepdim=True).clamp(min=1)
        means = torch.bmm(share.transpose(1, 2), tokens)  # [B, S, 128]
        hidden = (~mask).unsqueeze(-1) * MASKED
        scaled = tokens * (members @ self.max_scale) + members @ self.max_shift + hidden
        # `max` over `amax`: its gradient goes to one token and takes a third of the time.
        return torch.cat([(means * self.mean_scale).sum(1), scaled.max(1).values], 1)
