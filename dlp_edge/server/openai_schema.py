"""The JSON documents of OpenAI's interface; each carries the fusion in a field `dlp_edge`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from time import time
from typing import Any
from uuid import uuid4

from dlp_edge.types import Chunk, FinishReason, Reply, Token

Document = dict[str, Any]
# An answer that the server itself cut short is shorter than it was to be.
_FINISH: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "repetition": "stop",
    "cancelled": "length",
}

_LEAST = -9999.0  # OpenAI's number for what is as good as impossible; JSON has no infinity


class AnswerDocuments:
    """What is sent about one answer; all documents share its id."""

    def __init__(self, model: str) -> None:
        self._reported = 0  # tokens whose log probabilities were sent
        self._common = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time()), "model": model}

    def first(self) -> Document:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, chunk: Chunk) -> Document:
        self._reported += len(chunk.tokens)
        own = {"sentence": chunk.sentence, "fusion": chunk.fusion, "request": chunk.request}
        return self._chunk({"content": chunk.text}, chunk.tokens, dlp_edge=own)

    def last(self, reply: Reply) -> Document:
        """The chunk that closes a stream, with the log probabilities of tokens without text."""
        finish = _FINISH[reply.finish_reason]
        return self._chunk({}, reply.tokens[self._reported :], finish, dlp_edge=_about(reply))

    def usage(self, reply: Reply) -> Document:
        """What follows the last chunk for `stream_options.include_usage`."""
        return {**self._chunk({}), "choices": [], "usage": _usage(reply)}

    def whole(self, reply: Reply) -> Document:
        """The answer in one document."""
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _logprobs(reply.tokens),
            "finish_reason": _FINISH[reply.finish_reason],
        }
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(reply),
            "dlp_edge": _about(reply),
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


def model_document(name: str, created: int) -> Document:
    return {"id": name, "object": "model", "created": created, "owned_by": "dlp-edge"}


def model_list(names: Iterable[str], created: int) -> Document:
    return {"object": "list", "data": [model_document(name, created) for name in names]}


def _usage(reply: Reply) -> Document:
    prompt, completion = reply.usage.prompt_tokens, reply.usage.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reply.usage.cached_tokens},
    }


def _about(reply: Reply) -> Document:
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
