"""The plain values that a user of `Runtime` receives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "repetition", "cancelled"]
SelectRule = Literal["nucleus", "threshold", "top_k"]
WeighRule = Literal["softmax", "renormalise"]
KvPolicy = Literal["keep", "recompute"]
RouteEvery = Literal["sentence", "prompt"]
Overflow = Literal["error", "drop_oldest"]
Message = Mapping[str, str]
"""One chat message: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class RouteDecision:
    """What the router decided for one sentence.

    Attributes:
        probabilities: y = softmax(z), adapter name -> probability, given that one of them is
            meant; sums to 1.
        selected: the names kept by the selection rule, most probable first.
        weights: the fusion weights of the selected adapters (eq. 5), summing to 1; empty when
            the router abstained and the base model answers.
        confidence: the largest probability, times 1 - doubt.
        doubt: the probability that the text is for no adapter at all.
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
        confidence: that of the router's decision; None when the adapters were pinned.
    """

    text: str
    fusion: dict[str, float]
    confidence: float | None


@dataclass(frozen=True)
class Token:
    """A token of the answer (`logprobs`).

    Attributes:
        text: alone; part of a character is the replacement character.
        logprob: its natural log probability under the model, before any sampling option.
        top: the most probable tokens in its place: (id, text, logprob).
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Chunk:
    """A piece of streamed text: whole characters, never empty.

    Attributes:
        text: the new text.
        sentence: index of the sentence that the piece ends in, from 0.
        fusion: adapter name -> weight, as in force for that sentence.
        tokens: those generated since the chunk before, where `logprobs` asked for them.
    """

    text: str
    sentence: int
    fusion: dict[str, float]
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where the time of one request went, in seconds.

    Attributes:
        prefill: the prompt's pass through the backbone.
        decode: the passes after the prompt's, sampling, routing and text handling.
        first_token: from the request to the first token.
        router: all calls of the router.
        switch: writing fusions into the slots.
        recompute: prefilling the history again under a new fusion (`kv="recompute"`).
        routings: how often the router was asked.
        switches: how often the fusion changed while generating.
        decode_steps: passes after the prompt's; of one token each but for those with drafts.
        reused: tokens of the prompt that a session's cache had already.
        drafted, accepted: tokens that were guessed, and those of them that the answer took
            (`speculate`).
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
        """Tokens per second behind the prompt's pass; 0 where there were none."""
        tokens = self.decode_steps + self.accepted
        return tokens / self.decode if tokens and self.decode else 0.0


@dataclass(frozen=True)
class Reply:
    """A finished answer; `tokens` where `logprobs` asked for them."""

    text: str
    sentences: tuple[Sentence, ...]
    usage: Usage
    timings: Timings
    finish_reason: FinishReason
    tokens: tuple[Token, ...] = ()

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt that were processed, per second; 0 when there was none."""
        count = self.usage.prompt_tokens - self.timings.reused
        return count / self.timings.prefill if self.timings.prefill else 0.0


@dataclass(frozen=True)
class Likelihood:
    """How likely a given text is as an answer (`Runtime.score`).

    Attributes:
        text: the continuation.
        logprob: the natural log probability of its tokens, summed; where asked for, with that of
            the answer ending there.
        tokens: how many those are, without the end.
    """

    text: str
    logprob: float
    tokens: int


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter of the bundle: its largest rank and the modules it changes."""

    name: str
    rank: int
    target_modules: tuple[str, ...]
    routed: bool


@dataclass(frozen=True)
class Estimate:
    """Bytes that a loaded bundle takes. One pass's activations (tens of MB for a small backbone)
    come on top; the cache is only committed as far as it is used.

    Attributes:
        weights: the backbone, as onnxruntime holds it.
        adapters: all of them.
        router: its graph and last layer.
        tokenizers: the backbone's and the router's.
        cache: one KV cache for `max_context` tokens.
        available: what is free now; None for a device that cannot be asked.
    """

    weights: int
    adapters: int
    router: int
    tokenizers: int
    cache: int
    available: int | None

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.adapters + self.router + self.tokenizers + self.cache

    @property
    def fits(self) -> bool:
        """Whether there is room for it, as far as is known."""
        return self.available is None or self.total <= self.available
