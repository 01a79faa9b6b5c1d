"""Between text and token ids: chat template, tokenizer, detokeniser, stop strings."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from tokenizers import Tokenizer

from dlp_edge.errors import BundleError, UsageError
from dlp_edge.runtime.sandbox import (
    MAX_SOURCE,
    HostileTemplateError,
    SandboxedEnvironment,
    render,
)
from dlp_edge.types import Message

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_PROBE: list[Message] = [{"role": "user", "content": "Hello"}]
LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens at the most


class ChatTemplate:
    """A Jinja chat template, rendered in a sandbox.

    `source` None stands for a backbone without a template: the last user message as it is.
    """

    def __init__(self, source: str | None) -> None:
        self.is_plain = source is None
        self._template = None
        if source is None:
            return
        try:
            if len(source) > MAX_SOURCE:
                raise TemplateError(f"it has {len(source)} characters")
            self._template = SandboxedEnvironment().from_string(source)
        except Exception as error:  # what Jinja makes of a text can fail in Python's compiler, too
            raise BundleError(
                f"the bundle's chat template is not valid ({str(error)[:300]})",
                "Export the bundle with another one",
            ) from error
        with contextlib.suppress(UsageError):  # it may want other messages
            self.render(_PROBE)  # what has no end is refused before anyone waits for it

    def render(self, messages: Sequence[Message], bos: str = "", eos: str = "") -> str:
        """The prompt for these messages, ending where the assistant begins.

        Raises:
            UsageError: the template refuses the messages.
            BundleError: it takes or makes too much, or reaches for what is none of its business.
        """
        if self._template is None:
            return messages[-1]["content"]
        try:
            return render(
                self._template,
                messages=list(messages),
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=eos,
            )
        except (HostileTemplateError, SecurityError, RecursionError, MemoryError) as error:
            raise BundleError(
                f"the bundle's chat template is not harmless ({str(error)[:300]})",
                "Export the bundle with another one",
            ) from error
        except Exception as error:  # a template can fail in any way that Python can
            raise UsageError(
                f"the chat template refuses these messages ({str(error)[:300]})",
                "Change their roles or order",
            ) from error


class Detokenizer:
    """Turns generated ids into text piece by piece, never splitting a character.

    Each step decodes a short window: the ids given out last (what a decoder makes of an id
    depends on its neighbours: spaces, bytes) and the new ones.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # given out last
        self._held: list[int] = []  # not given out yet

    def step(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._held.append(token)
        piece = self._new_text()
        if piece.endswith(UNFINISHED) and len(self._held) < LONGEST_CHARACTER:
            return ""
        if piece:
            self._before, self._held = self._held, []
        return piece

    def finish(self) -> str:
        """What is left: an unfinished character, as the replacement character."""
        return self._new_text() if self._held else ""

    def _new_text(self) -> str:
        known = self._decode(self._before)
        return self._decode(self._before + self._held)[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopMatcher:
    """Holds back text that may become a stop string, and cuts at the first that does."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def feed(self, piece: str) -> str:
        """The text that is safe to give out now."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.matched, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once it is known that no stop string follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
