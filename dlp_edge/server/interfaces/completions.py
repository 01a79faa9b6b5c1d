"""`/v1/completions`: a text that the model continues, without the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import time
from typing import Any, cast
from uuid import uuid4

from dlp_edge.runtime.options import GenerateOptions
from dlp_edge.server.chat_request import (
    ChatRequest,
    Models,
    common_options,
    flag,
    most_tokens,
    own_options,
    refuse_unsupported,
    wrong,
)
from dlp_edge.server.interfaces.interface import Interface
from dlp_edge.server.openai_schema import FINISH, Document, about, usage_of
from dlp_edge.types import Chunk, Reply, Token

MOST_LOGPROBS = 20
# Unsupported parameters and the values with which they ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
}


def parse_completion(
    body: Mapping[str, Any], models: Models, max_messages: int, max_new_tokens: int
) -> ChatRequest:
    """The request in a body; see `parse_request`."""
    body = {name: value for name, value in body.items() if value is not None}
    refuse_unsupported(body, _NEUTRAL)
    options = common_options(body, models)
    count = body.get("logprobs")
    if count is not None and (type(count) is not int or not 0 <= count <= MOST_LOGPROBS):
        raise wrong("logprobs", f"is no whole number from 0 to {MOST_LOGPROBS}")
    options["logprobs"] = count
    options["max_new_tokens"] = most_tokens(body, ("max_tokens",), max_new_tokens)
    options.update(own_options(body))
    options["raw"] = True
    options["requests"] = "together"
    stream_options = body.get("stream_options", {})
    if not isinstance(stream_options, dict):
        raise wrong("stream_options", "is no object")
    return ChatRequest(
        model=body["model"],
        messages=_prompt(body.get("prompt")),
        options=cast("GenerateOptions", options),
        stream=flag("stream", body),
        include_usage=flag("include_usage", stream_options),
    )


def _prompt(given: object) -> str:
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if not isinstance(given, str):
        raise wrong("prompt", "is not one text. Send a text; several prompts are several requests")
    return given


class CompletionDocuments:
    """What is sent about one continuation; all documents share its id."""

    def __init__(self, order: ChatRequest) -> None:
        self._include_usage = order.include_usage
        self._reported = 0  # tokens whose log probabilities were sent
        self._offset = 0  # characters of the answer before them
        self._common = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time()),
            "model": order.model,
        }

    def first(self) -> list[Document]:
        """Nothing: the first piece opens a stream."""
        return []

    def piece(self, chunk: Chunk) -> list[Document]:
        self._reported += len(chunk.tokens)
        own = {"sentence": chunk.sentence, "fusion": chunk.fusion}
        return [{**self._document(chunk.text, chunk.tokens), "dlp_edge": own}]

    def last(self, reply: Reply) -> list[Document]:
        rest = reply.tokens[self._reported :]
        closing = self._document("", rest, FINISH[reply.finish_reason])
        documents: list[Document] = [{**closing, "dlp_edge": about(reply)}]
        if self._include_usage:
            documents.append({**self._common, "choices": [], "usage": usage_of(reply)})
        return documents

    def whole(self, reply: Reply) -> Document:
        document = self._document(reply.text, reply.tokens, FINISH[reply.finish_reason])
        return {**document, "usage": usage_of(reply), "dlp_edge": about(reply)}

    def _document(self, text: str, tokens: Sequence[Token], finish: str | None = None) -> Document:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish,
        }
        return {**self._common, "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token]) -> Document | None:
        if not tokens:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text: logprob for _, text, logprob in t.top} for t in tokens],
            "text_offset": offsets,
        }


COMPLETIONS = Interface(parse_completion, CompletionDocuments)
