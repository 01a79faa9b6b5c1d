"""The values that `Runtime` returns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

FinishReason = Literal["stop", "length", "repetition", "cancelled", "tool_calls"]
SelectRule = Literal["nucleus", "threshold", "top_k"]
WeighRule = Literal["softmax", "renormalise"]
KvPolicy = Literal["keep", "recompute"]
RouteEvery = Literal["sentence", "prompt"]
RequestsMode = Literal["together", "apart", "auto"]
Overflow = Literal["error", "drop_oldest"]
Message = Mapping[str, Any]
"""One chat message: {"role": "system" | "user" | "assistant" | "tool", "content": text}. One of the
assistant may have `tool_calls`, as OpenAI's; `ToolCall.message` is one of them."""


@dataclass(frozen=True)
class RouteDecision:
    """The router's decision for one sentence.

    Attributes:
        probabilities: y = softmax(z), adapter name -> probability, given that the text is in
            scope; sums to 1.
        selected: the adapters chosen by the selection rule, most probable first.
        weights: the fusion weights of the selected adapters (eq. 5), summing to 1; empty when
            the router abstained and the base model answers.
        confidence: the largest probability, times 1 - doubt.
        doubt: the probability that the text is out-of-scope (for no adapter).
    """

    probabilities: dict[str, float]
    selected: tuple[str, ...]
    weights: dict[str, float]
    confidence: float
    doubt: float = 0.0


@dataclass(frozen=True)
class Sentence:
    """A sentence of the answer and the adapters that wrote it.

    Attributes:
        text: the sentence, with the white space that follows it.
        fusion: adapter name -> weight; empty for the base model.
        confidence: of the router's decision; None when the adapters were pinned.
        request: index of the request that it answers; 0 unless the prompt was split.
    """

    text: str
    fusion: dict[str, float]
    confidence: float | None
    request: int = 0


@dataclass(frozen=True)
class Token:
    """A token of the answer, with `logprobs`.

    Attributes:
        text: decoded alone; an incomplete character becomes U+FFFD.
        logprob: its natural log probability under the model, before any sampling option.
        top: the most probable tokens at its position: (id, text, logprob).
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class ToolCall:
    """A call of one of a request's tools.

    Attributes:
        arguments_text: the arguments as the model wrote them: JSON that follows the tool's schema.
    """

    id: str
    name: str
    arguments_text: str

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments, parsed."""
        parsed: dict[str, Any] = json.loads(self.arguments_text)
        return parsed

    @property
    def message(self) -> dict[str, Any]:
        """The call as it stands in a message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments_text}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ToolCallPiece:
    """A piece of a streamed call.

    Attributes:
        index: of the call in the answer, from 0.
        arguments_text: what follows of the arguments; empty in a call's first piece.
    """

    index: int
    id: str
    name: str
    arguments_text: str


@dataclass(frozen=True)
class Chunk:
    """A piece of streamed text: whole characters, and empty only beside a `tool_call`.

    Attributes:
        text: the new text.
        sentence: index of the sentence that the piece ends in, from 0.
        fusion: adapter name -> weight for that sentence.
        tokens: those generated since the previous chunk, if `logprobs` is set.
        request: index of the request that it answers; 0 unless the prompt was split.
        tool_call: a piece of a call, where the model calls a tool.
    """

    text: str
    sentence: int
    fusion: dict[str, float]
    tokens: tuple[Token, ...] = ()
    request: int = 0
    tool_call: ToolCallPiece | None = None


@dataclass(frozen=True)
class Request:
    """One of the requests that a prompt holds: prompt[start:end].

    Attributes:
        decision: the router's for its text; None where the adapters were pinned.
        leans_on: index of an earlier request whose answer it needs ("say that like a pirate").
    """

    text: str
    start: int
    end: int
    decision: RouteDecision | None
    leans_on: int | None


@dataclass(frozen=True)
class AnsweredRequest(Request):
    """A request with its own answer and why that ended."""

    answer: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class Usage:
    """Token counts of one request.

    Attributes:
        cached_tokens: those of the prompt that a KV cache had already.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Time spent on one request, in seconds, and its counters.

    Attributes:
        prefill: the prompt's pass through the backbone.
        decode: the passes after the prompt's, sampling, routing and text handling.
        first_token: from the request to the first token.
        router: all calls of the router.
        switch: writing fused adapters into the slots.
        recompute: repeating the prefill of the history under a new fusion (`kv="recompute"`).
        routings: how often the router was asked.
        switches: how often the fusion changed while generating.
        decode_steps: passes after the prompt's, of one token each except those with drafts.
        reused: prompt tokens already in a session's KV cache.
        drafted, accepted: tokens drafted, and those of them accepted (`speculate`).
    """

    prefill: float = 0.0
    decode: float = 0.0
    first_token: float = 0.0
    router: float = 0.0
    switch: float = 0.0
    recompute: float = 0.0
    routings: int = 0
    switches: int = 0
    decode_steps: int = 0
    reused: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second; 0 if there were none."""
        tokens = self.decode_steps + self.accepted
        return tokens / self.decode if tokens and self.decode else 0.0


@dataclass(frozen=True)
class Reply:
    """A finished answer.

    Attributes:
        tokens: filled if `logprobs` is set.
        requests: those that the prompt was split into; empty if it was answered whole.
        seed: what sampling began with: the seed that was asked for, or the one that was drawn;
            None for a greedy answer. The same seed gives the same answer again.
        tool_calls: the tools that the model calls, each complete. `text` is what it says besides.
    """

    text: str
    sentences: tuple[Sentence, ...]
    usage: Usage
    timings: Timings
    finish_reason: FinishReason
    tokens: tuple[Token, ...] = ()
    seed: int | None = None
    requests: tuple[AnsweredRequest, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens processed per second; 0 if there were none."""
        count = self.usage.prompt_tokens - self.timings.reused
        return count / self.timings.prefill if self.timings.prefill else 0.0


@dataclass(frozen=True)
class Likelihood:
    """How likely a given text is as an answer (`Runtime.score`).

    Attributes:
        text: the continuation.
        logprob: the sum of its tokens' natural log probabilities, including that of the end of
            the answer if requested.
        tokens: number of tokens, without the end of the answer.
    """

    text: str
    logprob: float
    tokens: int


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter of the bundle.

    Attributes:
        rank: the largest rank over its modules.
        target_modules: the kinds of linear layers it changes, such as `self_attn.q_proj`.
        routed: whether the router can select it.
    """

    name: str
    rank: int
    target_modules: tuple[str, ...]
    routed: bool


@dataclass(frozen=True)
class Activity:
    """What a Runtime is doing.

    Attributes:
        running: requests under way.
        waiting: requests that wait for room beside them.
        prefix_bytes: of the KV caches of shared prefixes.
    """

    running: int
    waiting: int
    prefix_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """Memory that a loaded bundle takes, in bytes.

    Excludes the activations of a pass (tens of MB for a small backbone). The cache is committed
    only as it is used.

    Attributes:
        weights: the backbone's weights in onnxruntime.
        adapters: all of them.
        router: its graph and last layer.
        tokenizers: the backbone's and the router's.
        cache: one KV cache for `max_context` tokens.
        available: free memory now; None if the device does not report it.
    """

    weights: int
    adapters: int
    router: int
    tokenizers: int
    cache: int
    available: int | None

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.adapters + self.router + self.tokenizers + self.cache

    @property
    def fits(self) -> bool:
        """Whether the bundle fits into the available memory; True if that is unknown."""
        return self.available is None or self.total <= self.available
