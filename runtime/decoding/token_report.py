"""What is told of an answer's tokens: their texts and log probabilities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dlp_edge.runtime.decoding.sampling import largest_ids, log_probabilities_of
from dlp_edge.types import Token


class TokenReport:
    """The tokens of an answer that asks for log probabilities.

    Attributes:
        tokens: all so far.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens: list[Token] = []
        self._told = 0  # of these, in chunks
        self._tokenizer = tokenizer

    def add(self, token: int, logits: npt.NDArray[np.floating], count: int) -> None:
        """Reports a token that was chosen by logits [V], beside the `count` most likely ones."""
        best = largest_ids(logits, count)
        chosen, *scores = log_probabilities_of(logits, np.array([token, *best])).tolist()
        top = tuple(
            (id_, self._text_of(id_), score)
            for id_, score in zip(best.tolist(), scores, strict=True)
        )
        self.tokens.append(Token(token, self._text_of(token), chosen, top))

    def untold(self) -> tuple[Token, ...]:
        """The tokens that no chunk has carried yet."""
        tokens = tuple(self.tokens[self._told :])
        self._told = len(self.tokens)
        return tokens

    def _text_of(self, token: int) -> str:
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text
