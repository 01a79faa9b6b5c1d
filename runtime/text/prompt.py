"""From what a request says to prompt ids: chat messages, the template, the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from dlp_edge.bundle.manifest import TextBackbone
from dlp_edge.errors import BundleError, ContextLengthError, UsageError
from dlp_edge.runtime.text.tools import (
    DEFAULT_FORMAT,
    CallFormat,
    Tool,
    as_plain,
    characters_of,
    check_calls,
    for_template,
    learn_format,
    needs_tools,
)
from dlp_edge.types import Message
from dlp_edge.untrusted.chat_template import ChatTemplate

# What is before and after is encoded apart. A noncharacter, which no interchanged text contains.
CUT = "\U0010fffe"
ROLES = ("system", "user", "assistant", "tool")
# Characters a token: text of any language has fewer than 8 on average, and no text 32.
USUAL_CHARACTERS = 8
MOST_CHARACTERS = 32
CUT_TOKENS = 64  # by which cutting a text may raise its number of tokens


@dataclass(frozen=True)
class PromptEncoder:
    """A backbone's chat template and tokenizer."""

    template: ChatTemplate
    tokenizer: Tokenizer
    backbone: TextBackbone

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The prompt as text, to be encoded by `encode`; see `ChatTemplate.render`."""
        if tools or any(needs_tools(message) for message in messages):
            if tools and self.template.is_plain:
                raise UsageError(
                    "the bundle has no chat template, so its model cannot be told of tools",
                    "Export it with one, or leave out tools",
                )
            if self._own_format is None:
                messages, tools = as_plain(messages, tools), ()
        return self._render(messages, tools)

    @property
    def call_format(self) -> CallFormat:
        """How the model is told to write calls."""
        return self._own_format or DEFAULT_FORMAT

    @cached_property
    def _own_format(self) -> CallFormat | None:
        """The template's; None if it knows no tools, or none in a form that is known."""
        if not self.template.reads_tools:
            return None
        return learn_format(self._render, self._first_special)

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        return self.template.render(
            [self._literal_in(for_template(message)) for message in messages],
            self.backbone.bos_token,
            self.backbone.eos_token,
            [self._literal_in({"type": "function", "function": tool.function}) for tool in tools],
        )

    def _literal_in(self, value: Any) -> Any:
        """The value with all its texts, keys included, as `literal` has them."""
        if isinstance(value, str):
            return self.literal(value)
        if isinstance(value, Mapping):
            return {self._literal_in(key): self._literal_in(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._literal_in(each) for each in value]
        return value

    def _first_special(self, text: str) -> int:
        """Where the first special token starts; the text's length if there is none."""
        places = (text.find(token) for token in self._special)
        return min((place for place in places if place >= 0), default=len(text))

    def literal(self, text: str) -> str:
        """The text with a CUT inside whatever reads like a special token.

        Control tokens are the template's to write: `<|im_end|>` in a message is text about one.
        Every other text is returned, and so encoded, as it is.
        """
        text = text.replace(CUT, "")
        starts = sorted(start for token in self._special for start in _places(token, text))
        if not starts:
            return text
        cuts = [0, *(start + 1 for start in starts), len(text)]
        return CUT.join(text[start:end] for start, end in pairwise(cuts))

    def encode(self, rendered: str, room: int, raw: bool = False) -> list[int]:
        """The ids of a rendered prompt, for a context of `room` tokens.

        A text that is far too long is refused without encoding it all.

        Args:
            raw: whether it is a text without a template, which may begin with a special token of
                the tokenizer's.

        Raises:
            ContextLengthError: it has far more tokens than the context; a few more are returned.
            BundleError: the backbone has no such id.
        """
        check_length(len(rendered), room)
        alone = raw or self.template.is_plain
        stop = room * USUAL_CHARACTERS
        while stop < len(rendered):
            count = len(self._ids(rendered[:stop], alone))
            if count > room + CUT_TOKENS:
                raise too_long(f"more than {room} tokens", room)
            stop *= 2
        ids = self._ids(rendered, alone)
        known = self.backbone.vocab_size
        if max(ids, default=0) >= known:
            raise BundleError(
                f"the tokenizer gives the id {max(ids)}, the backbone knows {known}",
                "Export the bundle again",
            )
        return ids

    def prompt_ids(
        self, messages: Sequence[Message], room: int, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """The ids of a conversation's prompt, which leave room for an answer.

        Args:
            room: tokens of the context, prompt and answer together.

        Raises:
            ContextLengthError: it fills the context.
            UsageError: it has no tokens.
        """
        check_length(characters_of(messages, tools), room)
        ids = self.encode(self.render(messages, tools), room)
        if not ids:
            raise UsageError("the chat template makes an empty prompt of this", "Give it some text")
        return _with_room(ids, room)

    def raw_ids(self, prompt: str | Sequence[Message], room: int) -> list[int]:
        """As `prompt_ids`, of a text that is continued as it is.

        Raises:
            ContextLengthError: it fills the context.
            UsageError: it is no text.
        """
        if not isinstance(prompt, str):
            raise UsageError("a raw prompt is a text", "Give a text, or leave out raw")
        return _with_room(self.encode(prompt, room, raw=True), room)

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text alone, without the template and without control tokens."""
        return self._ids(self.literal(text), False)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of what is between the CUTs."""
        first, *rest = text.split(CUT)
        ids: list[int] = self.tokenizer.encode(first, add_special_tokens=add_special_tokens).ids
        for part in rest:
            ids += self.tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    @cached_property
    def _special(self) -> list[str]:
        """The special tokens, without those that begin with another: so at most one begins at any
        place of a text. A search for each takes time in proportion to the text; a pattern of all
        could take the product of their lengths."""
        added = self.tokenizer.get_added_tokens_decoder()
        ends = self.backbone.eos_token_ids
        texts = (token.content for id_, token in added.items() if token.special or id_ in ends)
        kept: list[str] = []
        for text in sorted(text for text in texts if len(text) > 1):  # one has no inside
            if not kept or not text.startswith(kept[-1]):
                kept.append(text)
        return kept


def _places(part: str, text: str) -> Iterator[int]:
    """The places where a part begins in a text, overlapping ones too."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _with_room(ids: list[int], room: int) -> list[int]:
    if len(ids) >= room:
        raise too_long(f"{len(ids)} tokens", room)
    return ids


def check_length(characters: int, room: int) -> None:
    """Raise ContextLengthError for a prompt that cannot fit into `room` tokens."""
    if characters > room * MOST_CHARACTERS:
        raise too_long(f"{characters} characters", room)


def too_long(what: str, room: int) -> ContextLengthError:
    """The error for a prompt that does not fit."""
    return ContextLengthError(
        f"the prompt has {what}, the context holds {room} tokens with the answer",
        "Shorten the prompt, or load the bundle with a larger max_context",
    )


def to_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """The prompt as chat messages, whose last user message is not blank.

    Raises:
        UsageError: the prompt is empty or malformed.
    """
    if isinstance(prompt, str):
        check_prompt(prompt)
        return [{"role": "user", "content": prompt}]
    messages: list[Message] = list(prompt) if isinstance(prompt, (list, tuple)) else []
    if not messages:
        raise UsageError(f"the prompt is {prompt!r}", "Pass a text or a list of messages")
    check_messages(messages)
    if not any(message["role"] == "user" for message in messages):
        raise UsageError("the messages hold none of the user", 'Add one with the role "user"')
    check_prompt(last_user_text(messages))
    return messages


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """Check that every message has a role and a content, both strings.

    Raises:
        UsageError: the messages are not a list, or one of them is malformed.
    """
    if not isinstance(messages, (list, tuple)):
        raise UsageError(f"the messages are {messages!r}", "Pass a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UsageError(
                f"{message!r} is not a message", 'Write {"role": "user", "content": "..."}'
            )
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise UsageError(f"role or content of {message!r} is not a string", "Pass strings")
        if message["role"] not in ROLES:
            raise UsageError(f"unknown role {message['role']!r}", f"Use {', '.join(ROLES)}")
        check_encoding(message["role"] + message["content"])
        check_calls(message)
    return list(messages)


def last_user_text(messages: Sequence[Message]) -> str:
    """The last user message, which the router reads; "" without one."""
    texts = [message["content"] for message in messages if message["role"] == "user"]
    return texts[-1] if texts else ""


def check_prompt(text: object) -> None:
    """Raise UsageError unless the prompt is a non-blank, encodable string."""
    check_text(text, "the prompt")
    if isinstance(text, str) and not text.strip():
        raise UsageError("the prompt is empty", "Pass some text")


def check_text(text: object, name: str = "the text") -> None:
    """Raise UsageError unless it is an encodable string."""
    if not isinstance(text, str):
        raise UsageError(f"{name} is {type(text).__name__}, not a string", "Pass a string")
    check_encoding(text)


def check_encoding(text: str) -> None:
    """Raise UsageError for text with a lone surrogate, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid Unicode", "Check its encoding") from error
