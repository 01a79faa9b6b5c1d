"""The backbone's tokenizer as applications use it: texts, ids, and what a prompt costs."""

from __future__ import annotations

from collections.abc import Sequence

from dlp_edge.checks import check_number
from dlp_edge.errors import UsageError
from dlp_edge.runtime.text.prompt import PromptEncoder, check_text, to_messages
from dlp_edge.types import Message

UNLIMITED = 1 << 60  # tokens: what does not fit is counted, too


class TextTokenizer:
    """`Runtime.tokenizer`. Thread-safe; works on after the Runtime is closed.

    Args:
        max_context: tokens of prompt and answer together.
    """

    def __init__(self, encoder: PromptEncoder, max_context: int) -> None:
        self._encoder = encoder
        self._max_context = max_context

    def encode(self, text: str) -> list[int]:
        """The ids of a text alone. What reads like a control token is text, as in a message.

        Raises:
            UsageError: it is not a text.
        """
        check_text(text)
        return self._encoder.encode_text(text)

    def decode(self, ids: Sequence[int], control: bool = False) -> str:
        """The text of ids.

        Args:
            control: whether to write control tokens out.

        Raises:
            UsageError: an id is none of the backbone's.
        """
        known = self._encoder.backbone.vocab_size
        for id_ in ids:
            check_number("an id", id_, whole=True)
            if not 0 <= id_ < known:
                raise UsageError(f"an id is {id_}", f"The backbone's are 0 to {known - 1}")
        text: str = self._encoder.tokenizer.decode(ids, skip_special_tokens=not control)
        return text

    def count(self, prompt: str | Sequence[Message]) -> int:
        """The tokens of a whole prompt, with the chat template: `Reply.usage.prompt_tokens`.

        Raises:
            UsageError: the prompt is empty or malformed.
        """
        rendered = self._encoder.render(to_messages(prompt))
        return len(self._encoder.encode(rendered, UNLIMITED))

    def room(self, prompt: str | Sequence[Message]) -> int:
        """The most tokens that the answer to a prompt can have; 0 if the prompt does not fit.

        Raises:
            UsageError: the prompt is empty or malformed.
        """
        left = self._max_context - self.count(prompt)
        return left + 1 if left > 0 else 0  # the last token needs no place in the cache
