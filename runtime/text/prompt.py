"""From what a request says to prompt ids: chat messages, the template, the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from dlp_edge.bundle.manifest import BackboneEntry
from dlp_edge.errors import BundleError, UsageError
from dlp_edge.types import Message
from dlp_edge.untrusted.chat_template import ChatTemplate


@dataclass(frozen=True)
class PromptEncoder:
    """A backbone's chat template and tokenizer."""

    template: ChatTemplate
    tokenizer: Tokenizer
    backbone: BackboneEntry

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as text; see `ChatTemplate.render`."""
        return self.template.render(messages, self.backbone.bos_token, self.backbone.eos_token)

    def encode(self, rendered: str) -> list[int]:
        """The ids of a rendered prompt.

        Raises:
            BundleError: the backbone has no such id.
        """
        ids: list[int] = self.tokenizer.encode(
            rendered, add_special_tokens=self.template.is_plain
        ).ids
        known = self.backbone.vocab_size
        if max(ids, default=0) >= known:
            raise BundleError(
                f"the tokenizer gives the id {max(ids)}, the backbone knows {known}",
                "Export the bundle again",
            )
        return ids


def to_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """The prompt as chat messages, of which the user has said something.

    Raises:
        UsageError: it is empty, or no messages.
    """
    if isinstance(prompt, str):
        check_prompt(prompt)
        return [{"role": "user", "content": prompt}]
    messages: list[Message] = list(prompt) if isinstance(prompt, (list, tuple)) else []
    if not messages:
        raise UsageError(f"the prompt is {prompt!r}", "Give a text or a list of messages")
    check_messages(messages)
    check_prompt(last_user_text(messages))
    return messages


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages, each with a role and a content that are texts.

    Raises:
        UsageError: they are no list, or one of them has not.
    """
    if not isinstance(messages, (list, tuple)):
        raise UsageError(f"the messages are {messages!r}", "Give a list of messages")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UsageError(
                f"{message!r} is no message", 'Write {"role": "user", "content": "..."}'
            )
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise UsageError(f"{message!r} has a role or content that is no text", "Give texts")
        check_encoding(message["role"] + message["content"])
    return list(messages)


def last_user_text(messages: Sequence[Message]) -> str:
    """What the router reads: the last thing that the user said."""
    said = [message["content"] for message in messages if message["role"] == "user"]
    return said[-1] if said else ""


def check_prompt(text: object) -> None:
    """Raises UsageError unless a prompt is text that says something and can be encoded."""
    if not isinstance(text, str):
        raise UsageError(f"the prompt is {type(text).__name__}, not text", "Give it as text")
    if not text.strip():
        raise UsageError("the prompt is empty", "Give it some text")
    check_encoding(text)


def check_encoding(text: str) -> None:
    """Raises UsageError for text that holds half a surrogate pair: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid Unicode", "Check its encoding") from error
