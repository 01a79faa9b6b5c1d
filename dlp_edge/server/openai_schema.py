"""The JSON documents of OpenAI's interface; each carries the fusion in a field `dlp_edge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from time import time
from typing import Any
from uuid import uuid4

from dlp_edge.types import AdapterInfo, Chunk, FinishReason, Reply, Token, ToolCallPiece

Document = dict[str, Any]
# An answer that the server itself cut short is shorter than it was to be.
FINISH: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "repetition": "stop",
    "cancelled": "length",
    "tool_calls": "tool_calls",
}

_LEAST = -9999.0  # OpenAI's number for what is as good as impossible; JSON has no infinity


class AnswerDocuments:
    """What is sent about one answer; all documents share its id.

    Args:
        include_usage: whether a stream ends with the token counts.
    """

    def __init__(self, model: str, include_usage: bool = False) -> None:
        self._include_usage = include_usage
        self._reported = 0  # tokens whose log probabilities were sent
        self._common = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time()), "model": model}

    def first(self) -> list[Document]:
        """What opens a stream."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def piece(self, chunk: Chunk) -> list[Document]:
        """What is sent of a chunk."""
        self._reported += len(chunk.tokens)
        own = {"sentence": chunk.sentence, "fusion": chunk.fusion, "request": chunk.request}
        delta: Document = {"content": chunk.text}
        if chunk.tool_call is not None:
            delta = {"tool_calls": [_call_delta(chunk.tool_call)]}
        return [self._chunk(delta, chunk.tokens, dlp_edge=own)]

    def last(self, reply: Reply) -> list[Document]:
        """What closes a stream, with the log probabilities of tokens without text."""
        finish = FINISH[reply.finish_reason]
        rest = reply.tokens[self._reported :]
        closing = [self._chunk({}, rest, finish, dlp_edge=about(reply))]
        if self._include_usage:
            closing.append({**self._chunk({}), "choices": [], "usage": usage_of(reply)})
        return closing

    def whole(self, reply: Reply) -> Document:
        """The answer in one document."""
        message: Document = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.tool_calls:
            message["content"] = reply.text or None
            message["tool_calls"] = [call.message for call in reply.tool_calls]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _logprobs(reply.tokens),
            "finish_reason": FINISH[reply.finish_reason],
        }
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage_of(reply),
            "dlp_edge": about(reply),
        }

    def _chunk(
        self,
        delta: Document,
        tokens: Sequence[Token] = (),
        finish: str | None = None,
        **more: Any,
    ) -> Document:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": _logprobs(tokens),
            "finish_reason": finish,
        }
        return {
            **self._common,
            "object": "chat.completion.chunk",
            "choices": [choice],
            **more,
        }


def _call_delta(piece: ToolCallPiece) -> Document:
    """A call's first piece names it, the others carry its arguments."""
    function = {"arguments": piece.arguments_text}
    if piece.arguments_text:
        return {"index": piece.index, "function": function}
    function["name"] = piece.name
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def model_document(name: str, created: int, adapter: AdapterInfo | None = None) -> Document:
    """A name that requests may have as `model`; `adapter` is the one that it pins."""
    own = None if adapter is None else asdict(adapter)
    document = {"id": name, "object": "model", "created": created, "owned_by": "dlp-edge"}
    return {**document, "dlp_edge": {"adapter": own}}


def usage_of(reply: Reply) -> Document:
    """The token counts of an answer."""
    prompt, completion = reply.usage.prompt_tokens, reply.usage.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reply.usage.cached_tokens},
    }


def about(reply: Reply) -> Document:
    """What the field `dlp_edge` says of a whole answer."""
    return {
        "sentences": [asdict(sentence) for sentence in reply.sentences],
        "timings": asdict(reply.timings),
        "requests": [asdict(request) for request in reply.requests],
    }


def _logprobs(tokens: Sequence[Token]) -> Document | None:
    if not tokens:
        return None
    content = [
        {
            **_logprob(token.text, token.logprob),
            "top_logprobs": [_logprob(text, logprob) for _, text, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _logprob(text: str, logprob: float) -> Document:
    """`bytes` are those of whole characters; a part of one has no text of its own."""
    whole = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": whole}
