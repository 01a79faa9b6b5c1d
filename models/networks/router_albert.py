"""The ALBERT router: the paper's second architecture, 11 million parameters (arXiv 1909.11942).

It has the same input as the mini-MLP and the same kind of last layer, so everything downstream
(doubt, calibration, new skills) is shared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertModel
from transformers.utils import logging

from dlp_edge.errors import RouterError
from dlp_edge.models.networks.network import RouterNetwork
from dlp_edge.runtime.routing.router_input import PROMPT_SEGMENTS

# albert-base-v2: twelve passes through one layer.
BASE = {
    "embedding_size": 128,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
LONGEST = 512  # position embeddings of ALBERT


class RouterAlbert(RouterNetwork):
    """Features of router inputs (`dlp_edge.runtime.routing.router_input.RouterInputEncoder`).

    Args:
        vocab_size: the tokenizer's ids and, last, the separator between segments.
        num_rows: rows of the last layer.
        settings: of `AlbertConfig`; None takes BASE.
    """

    def __init__(
        self, vocab_size: int, num_rows: int, settings: dict[str, int] | None = None
    ) -> None:
        super().__init__()
        self.separator = vocab_size - 1
        self.settings = dict(settings or BASE)
        config = AlbertConfig(
            vocab_size=vocab_size,
            max_position_embeddings=LONGEST,
            attn_implementation="eager",  # the ONNX exporter supports no other
            **self.settings,
        )
        self.body = AlbertModel(config)
        self.width = config.hidden_size
        self.head = nn.Linear(self.width, num_rows)

    def features(
        self, input_ids: Tensor, mask: Tensor, noise: torch.Generator | None = None
    ) -> Tensor:
        """[B, F]: ALBERT's pooled output; `noise` is unused, since it has no dropout.

        The separator replaces [CLS] and [SEP]; token type 1 marks what follows the prompt's
        segments.
        """
        first = torch.full_like(input_ids[:, :1], self.separator)
        ids = torch.cat([first, input_ids], 1)
        attention = torch.cat([torch.ones_like(first), mask.long()], 1)
        answer = (ids == self.separator).long().cumsum(1) > PROMPT_SEGMENTS
        output = self.body(input_ids=ids, attention_mask=attention, token_type_ids=answer.long())
        return output.pooler_output

    def take_weights(self, source: str | Path) -> None:
        """Load the weights of a pretrained ALBERT with the same tokenizer.

        Raises:
            RouterError: they cannot be read, or have other shapes.
        """
        try:
            logging.set_verbosity_error()
            found = AlbertModel.from_pretrained(str(source)).state_dict()
        except Exception as error:  # transformers raises many kinds
            raise RouterError(
                f"the weights {source} cannot be read ({str(error).splitlines()[0]})",
                "Name a folder or hub id of a pretrained ALBERT",
            ) from error
        own = self.body.state_dict()
        name = "embeddings.word_embeddings.weight"
        pieces = found.pop(name)
        if len(pieces) != len(own[name]) - 1:
            raise RouterError(
                f"{source} has {len(pieces)} pieces, the tokenizer {len(own[name]) - 1}",
                "Give its own tokenizer with --tokenizer",
            )
        found[name] = torch.cat([pieces, pieces.mean(0, keepdim=True)])
        try:
            self.body.load_state_dict(found, strict=False)
        except RuntimeError as error:
            raise RouterError(
                f"{source} is an ALBERT of another shape ({str(error).splitlines()[0]})",
                "Use one of albert-base-v2's",
            ) from error
