"""The mini-MLP router: pooled embeddings and one hidden layer (after DLP-LoRA, arXiv 2410.01497).

The paper pools the whole context as one bag of tokens, its mean and its maximum. At a sentence
start that cannot tell what has been asked from what is being written, so here the window comes in
segments (`dlp_edge.runtime.routing.router_input`), and the pooling knows them:

- six means over the whole window, each with its own scale for every segment and dimension;
- one maximum over all tokens, scaled and shifted by segment, each with a part of the token before
  it, so that word pairs count;
- the mean of the prompt's parts that the answer is about: a part weighs by the tokens, rare ones
  above all, that it shares with the answer.

The last layer is separate (`features` and `head`): see `dlp_edge.bundle.router_head`. The pooled
embeddings are appended to the features. The last layer does not read them, but the row of a skill
that is added later does (`dlp_edge.runtime.adapters.fit_router_row`), since the hidden layers keep
little that the skills of the training do not need.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlp_edge.models.networks.network import RouterNetwork, dropped
from dlp_edge.runtime.routing.router_input import ANSWER_SEGMENTS, PROMPT_SEGMENTS, SEGMENTS

EMBEDDING = 128
# The number of means, the widths of the hidden layers (0 is none), whether the pooled embeddings
# are among the features, and whether the hidden layers read them normalised. Routers of earlier
# releases lack some of these settings and take them from EARLIER.
BASE = {"means": 6, "hidden_1": 512, "hidden_2": 0, "hidden_3": 0, "pooled": 1, "norm": 1}
EARLIER = {"means": 4, "hidden_1": 512, "hidden_2": 768, "hidden_3": 512, "pooled": 0, "norm": 0}
SPREAD = 0.1  # of new embeddings: small, so that a word never seen says little
DROPOUT = 0.3  # of hidden units
POOLED_DROPOUT = 0.2

# How the means begin: the prompt from its beginning, from its end, what is done, what is being
# begun, what was asked at the very first, and in the middle.
_ANSWER_DONE = (1.0, 0.5, 0.7, 0.2, 0.0)
_ANSWER_BEGUN = (0.0, 0.5, 0.0, 0.5, 1.0)
_ASKED_FIRST = (1.0, 0.3, 0.1)
_MATCHING = (0.0, 0.1, 0.3, 0.6, 1.0)


class RouterMLP(RouterNetwork):
    """Scores R rows for windows of token ids
    (`dlp_edge.runtime.routing.router_input.RouterInputEncoder`).

    Args:
        vocab_size: the tokenizer's ids and, last, the separator between segments.
        num_rows: R, the labels and the out-of-scope row.
        settings: as in BASE; None takes BASE, an empty one EARLIER.
    """

    def __init__(
        self, vocab_size: int, num_rows: int, settings: dict[str, int] | None = None
    ) -> None:
        super().__init__()
        self.separator = vocab_size - 1
        self.settings = dict(BASE) if settings is None else {**EARLIER, **settings}
        means = self.settings["means"]
        self.embedding = nn.Embedding(vocab_size, EMBEDDING)
        nn.init.normal_(self.embedding.weight, std=SPREAD)
        self.rarity = nn.Parameter(torch.ones(vocab_size))
        noise = torch.randn(means, SEGMENTS, EMBEDDING) / 10
        self.mean_scale = nn.Parameter((_first_scales()[:means].unsqueeze(2) + noise) / SPREAD)
        self.max_scale = nn.Parameter(torch.rand(SEGMENTS, EMBEDDING) / SPREAD)
        self.max_shift = nn.Parameter(torch.randn(SEGMENTS, EMBEDDING) / 2)
        self.before_scale = nn.Parameter(torch.randn(EMBEDDING) * 0.3 / SPREAD)
        self.match_weight = nn.Parameter(torch.tensor(_MATCHING))
        self.match_scale = nn.Parameter(torch.full((EMBEDDING,), 1 / SPREAD))
        hidden = (self.settings[f"hidden_{at}"] for at in (1, 2, 3))
        widths = ((means + 2) * EMBEDDING, *(width for width in hidden if width))
        self.norm = nn.LayerNorm(widths[0]) if self.settings["norm"] else nn.Identity()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], num_rows)
        self.width = widths[-1] + (widths[0] if self.settings["pooled"] else 0)

    @property
    def linear_layers(self) -> list[nn.Linear]:
        """The layers before the last one, each followed by ReLU."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def features(
        self, input_ids: Tensor, mask: Tensor, noise: torch.Generator | None = None
    ) -> Tensor:
        """What last layers may read, [B, F]; `noise` draws the dropout of training."""
        pooled = self.pool(input_ids, mask)
        value = dropped(self.norm(pooled), POOLED_DROPOUT, noise)
        for layer in self.layers:
            value = dropped(torch.relu(layer(value)), DROPOUT, noise)
        return torch.cat([value, pooled], 1) if self.settings["pooled"] else value

    def pool(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """[B, (M + 2) x 128]: the means, the maximum, the mean of the matching parts of the
        prompt."""
        segment = ((input_ids == self.separator) & mask).long().cumsum(1)
        segment = segment.masked_fill(~mask, SEGMENTS)  # padding is a segment of its own
        members = functional.one_hot(segment, SEGMENTS + 1)[:, :, :SEGMENTS]  # [B, L, S]
        members = members.to(self.mean_scale.dtype)
        tokens = self.embedding(input_ids)  # [B, L, 128]
        share = members / members.sum(1, keepdim=True).clamp(min=1)
        means = torch.bmm(share.transpose(1, 2), tokens)  # [B, S, 128]
        weighed = torch.einsum("bse,mse->bme", means, self.mean_scale).flatten(1)
        parts = means[:, :PROMPT_SEGMENTS] * self.match_scale
        weights = self._part_weights(input_ids, members).unsqueeze(1)
        matching = torch.bmm(weights, parts).squeeze(1)
        return torch.cat([weighed, self._maximum(tokens, segment), matching], 1)

    def _maximum(self, tokens: Tensor, segment: Tensor) -> Tensor:
        """[B, 128]. Which token is highest is found first, without gradients, so that they need
        not go through all tokens: half of the time of training."""
        with torch.no_grad():
            ones = torch.ones(1, EMBEDDING)  # padding's scale; its shift keeps it from winning
            scaled = functional.embedding(segment, torch.cat([self.max_scale, ones]))
            scaled *= tokens
            scaled += functional.embedding(segment, torch.cat([self.max_shift, -torch.inf * ones]))
            scaled[:, 1:].addcmul_(tokens[:, :-1], self.before_scale)
            highest = scaled.max(1, keepdim=True).indices  # [B, 1, 128]
        before = tokens.gather(1, (highest - 1).clamp(min=0)) * (highest > 0)
        at = segment.gather(1, highest.squeeze(1)).unsqueeze(1)
        scale, shift = (
            each.unsqueeze(0).expand(len(at), -1, -1).gather(1, at)
            for each in (self.max_scale, self.max_shift)
        )
        found = tokens.gather(1, highest) * scale + shift + before * self.before_scale
        return found.squeeze(1)

    def _part_weights(self, input_ids: Tensor, members: Tensor) -> Tensor:
        """[B, P]: how much each part of the prompt shares with the answer; they sum to 1."""
        asked, answered = members.split([PROMPT_SEGMENTS, ANSWER_SEGMENTS], 2)
        begun = int((answered.sum(2) > 0).any(0).int().argmax())  # no answer begins before it
        weights = answered[:, begun:] @ self.match_weight  # [B, A]
        same = input_ids.unsqueeze(2) == input_ids[:, begun:].unsqueeze(1)  # [B, L, A]
        shared = (same * weights.unsqueeze(1)).sum(2)  # [B, L]
        found = torch.bmm((shared * self.rarity[input_ids]).unsqueeze(1), asked)  # [B, 1, P]
        return found.softmax(2).squeeze(1)


def _first_scales() -> Tensor:
    """[M, S]"""
    falling = torch.linspace(1, 0, PROMPT_SEGMENTS)
    scales = torch.zeros(BASE["means"], SEGMENTS)
    scales[0, :PROMPT_SEGMENTS] = falling**2
    scales[1, :PROMPT_SEGMENTS] = (1 - falling) ** 2
    scales[2, PROMPT_SEGMENTS:] = torch.tensor(_ANSWER_DONE)
    scales[3, PROMPT_SEGMENTS:] = torch.tensor(_ANSWER_BEGUN)
    scales[4, : len(_ASKED_FIRST)] = torch.tensor(_ASKED_FIRST)
    scales[5, :PROMPT_SEGMENTS] = 4 * falling * (1 - falling)
    return scales
