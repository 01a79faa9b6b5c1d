"""One answer: route, fuse, prefill, then token by token, routing again at every sentence start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

from tokenizers import Tokenizer

from dlp_edge.runtime.decoder import Cancelled, Decoder, Logits
from dlp_edge.runtime.fusion import Fuser
from dlp_edge.runtime.options import Decoding
from dlp_edge.runtime.sampling import make_sampler
from dlp_edge.runtime.sentences import SentenceSplitter
from dlp_edge.runtime.steering import Pinned, Steering
from dlp_edge.runtime.text import Detokenizer, StopMatcher
from dlp_edge.types import Chunk, FinishReason, Reply, Sentence, Timings, Usage


@dataclass(frozen=True)
class Engine:
    """What a loaded bundle generates with."""

    decoder: Decoder
    fuser: Fuser
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]


@dataclass
class _Start:
    """Where a sentence starts in the answer, and what writes it."""

    offset: int
    fusion: dict[str, float]
    confidence: float | None


@dataclass
class Generation:
    """The state of one answer.

    Attributes:
        prompt_ids: the whole prompt, template included.
        user_text: what the router reads of it.
        should_stop: asked before every pass; True ends the answer as "cancelled".
    """

    engine: Engine
    prompt_ids: Sequence[int]
    user_text: str
    decoding: Decoding
    steering: Steering
    should_stop: Callable[[], bool]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "cancelled"
    timings: Timings = field(default_factory=Timings)
    _starts: list[_Start] = field(default_factory=list)

    def run(self) -> Iterator[Chunk]:
        """Generates the answer; each chunk belongs to one sentence."""
        begun = perf_counter()
        sampler = make_sampler(
            self.decoding.temperature,
            self.decoding.top_p,
            self.decoding.top_k,
            self.decoding.seed,
        )
        detokenizer = Detokenizer(self.engine.tokenizer)
        splitter, stops = SentenceSplitter(), StopMatcher(self.decoding.stop)
        raw = ""  # all text, also what is held back for stop strings
        try:
            logits = self._begin()
            while True:
                resumed = perf_counter()  # while a consumer holds a chunk no time is counted
                token = sampler(logits)
                if not self.tokens:
                    self._spend(first_token=perf_counter() - begun)
                if token in self.engine.eos_token_ids:
                    self.finish_reason = "stop"
                    break
                self.tokens.append(token)
                piece = detokenizer.step(token)
                raw += piece
                changed = self._enter_sentences(splitter.feed(piece), raw)
                text = stops.feed(piece)
                self._spend(decode=perf_counter() - resumed)
                yield from self._give(text)
                if stops.matched:
                    self.finish_reason = "stop"
                    break
                if self._is_full():
                    self.finish_reason = "length"
                    break
                logits = self._next(token, changed)
        except Cancelled:
            pass  # as `finish_reason` says until the answer ends by itself
        if not stops.matched:
            rest = detokenizer.finish()
            yield from self._give(stops.feed(rest) + stops.finish())

    def reply(self) -> Reply:
        """The answer so far."""
        edges = [start.offset for start in self._starts] + [len(self.text)]
        sentences = tuple(
            Sentence(self.text[start.offset : end], start.fusion, start.confidence)
            for start, end in zip(self._starts, edges[1:], strict=True)
            if start.offset < len(self.text)
        )
        usage = Usage(len(self.prompt_ids), len(self.tokens))
        return Reply(self.text, sentences, usage, self.timings, self.finish_reason)

    def _begin(self) -> Logits:
        """Route on the prompt, fuse, prefill."""
        if self.should_stop():
            raise Cancelled
        fusion, confidence = self._route("")
        self._starts = [_Start(0, fusion, confidence)]
        self._fuse(fusion)
        self.engine.decoder.truncate(0)
        begun = perf_counter()
        logits = self.engine.decoder.prefill(self.prompt_ids, self.should_stop)
        self._spend(prefill=perf_counter() - begun)
        return logits

    def _enter_sentences(self, offsets: list[int], generated: str) -> bool:
        """At the first token of a sentence: route on all text so far. True if the fusion changed.

        Of several starts inside one token only the last is routed: nothing more is generated for
        the others.
        """
        if not offsets:
            return False
        before = self._starts[-1]
        self._starts += [replace(before, offset=offset) for offset in offsets]
        if isinstance(self.steering, Pinned):
            return False
        fusion, confidence = self._route(generated)
        self._starts[-1] = _Start(offsets[-1], fusion, confidence)
        if fusion == before.fusion:
            return False
        self._fuse(fusion)
        self._spend(switches=1)
        return True

    def _next(self, token: int, changed: bool) -> Logits:
        """The pass for the newest token, after the history's where the policy asks for it."""
        if self.should_stop():
            raise Cancelled
        decoder = self.engine.decoder
        if changed and self.decoding.kv == "recompute":
            begun = perf_counter()
            decoder.truncate(0)
            decoder.prefill([*self.prompt_ids, *self.tokens[:-1]], self.should_stop)
            self._spend(recompute=perf_counter() - begun)
        begun = perf_counter()
        logits = decoder.step(token)
        self._spend(decode=perf_counter() - begun, decode_steps=1)
        return logits

    def _route(self, generated: str) -> tuple[dict[str, float], float | None]:
        if isinstance(self.steering, Pinned):
            return self.steering.weights, None
        begun = perf_counter()
        decision = self.steering.decide(self.user_text, generated)
        self._spend(router=perf_counter() - begun, routings=1)
        return decision.weights, decision.confidence

    def _fuse(self, fusion: dict[str, float]) -> None:
        begun = perf_counter()
        self.engine.decoder.set_fusion(self.engine.fuser.fuse(fusion))
        self._spend(switch=perf_counter() - begun)

    def _give(self, text: str) -> Iterator[Chunk]:
        """Adds text to the answer, as one chunk per sentence."""
        start, end = len(self.text), len(self.text) + len(text)
        self.text += text
        cuts = [at.offset for at in self._starts if start < at.offset < end]
        for left, right in zip([start, *cuts], [*cuts, end], strict=True):
            if left < right:
                index = max(i for i, at in enumerate(self._starts) if at.offset <= left)
                yield Chunk(self.text[left:right], index, self._starts[index].fusion)

    def _is_full(self) -> bool:
        decoder = self.engine.decoder
        return (
            len(self.tokens) >= self.decoding.max_new_tokens
            or decoder.length >= decoder.max_context
        )

    def _spend(self, **amounts: float) -> None:
        """Adds seconds and counts to the timings."""
        now = {key: getattr(self.timings, key) + amount for key, amount in amounts.items()}
        self.timings = replace(self.timings, **now)
