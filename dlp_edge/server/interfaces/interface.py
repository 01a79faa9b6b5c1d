"""What an interface is: a reader of requests, and a writer of documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dlp_edge.server.chat_request import ChatRequest, Models, parse_request
from dlp_edge.server.openai_schema import AnswerDocuments, Document
from dlp_edge.types import Chunk, Reply


class Documents(Protocol):
    """What is sent about one answer."""

    def first(self) -> Sequence[Document]:
        """What opens a stream."""

    def piece(self, chunk: Chunk) -> Sequence[Document]:
        """What is sent of a chunk."""

    def last(self, reply: Reply) -> Sequence[Document]:
        """What closes a stream."""

    def whole(self, reply: Reply) -> Document:
        """The answer in one document."""


@dataclass(frozen=True)
class Interface:
    """A path that generates.

    Attributes:
        parse: the request in (body, models, most messages, most new tokens); raises HttpError.
        documents: what is sent about the answer to a request.
        named: whether the events of a stream carry their documents' `type` as their names, and
            the last one ends it; otherwise `[DONE]` does.
    """

    parse: Callable[[Mapping[str, Any], Models, int, int], ChatRequest]
    documents: Callable[[ChatRequest], Documents]
    named: bool = False


CHAT = Interface(parse_request, lambda order: AnswerDocuments(order.model, order.include_usage))
