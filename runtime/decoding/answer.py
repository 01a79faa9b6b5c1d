"""One answer in the making: samples tokens, finds its sentences, asks who writes them.

Knows no backbone: a loop (`generation.py`) brings it logits and does what it asks for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dlp_edge.errors import NonFiniteError
from dlp_edge.runtime.decoding.json_constraint import JsonConstraint, grammar_tokenizer
from dlp_edge.runtime.decoding.sampling import log_probabilities, make_sampler, penalise
from dlp_edge.runtime.options import Decoding
from dlp_edge.runtime.routing.policy import Pinned, Steering
from dlp_edge.runtime.text.detokenizer import Detokenizer, StopMatcher
from dlp_edge.runtime.text.sentences import SentenceSplitter
from dlp_edge.types import (
    Chunk,
    FinishReason,
    Reply,
    RouteDecision,
    Sentence,
    Timings,
    Token,
    Usage,
)

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class Vocabulary:
    """The backbone's tokenizer, the number of its logits, and the tokens that end an answer."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.eos_token_ids = eos_token_ids

    @cached_property
    def for_grammars(self) -> LLTokenizer:
        """Made when the first answer asks for it."""
        return grammar_tokenizer(self.tokenizer, self.size, self.eos_token_ids)


@dataclass
class _Start:
    """Where a sentence starts in the answer, and what writes it."""

    offset: int
    fusion: dict[str, float]
    confidence: float | None


class Answer:
    """The state of one answer.

    Args:
        prompt_ids: the whole prompt, template included.
        user_text: what the router reads of it.
        room: tokens that the cache holds, prompt and answer together.

    Attributes:
        tokens: the answer's, the newest last.
        fusion: what writes the sentence that the next token belongs to.
        changed: whether the newest token changed the fusion.
        limit: the most tokens that the answer may have.
        done: whether the answer is complete.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int],
        user_text: str,
        decoding: Decoding,
        steering: Steering,
        room: int,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.room = room
        self.kv = decoding.kv
        self.speculate = decoding.speculate
        self.tokens: list[int] = []
        self.fusion: dict[str, float] = {}
        self.changed = False
        self.done = False
        self.timings = Timings()
        self._user_text = user_text
        self._steering = steering
        self._decided: RouteDecision | None = None  # for the running sentence
        self._vocabulary = vocabulary
        self._ends = vocabulary.eos_token_ids | decoding.stop_tokens
        # The newest token needs no room: it is in no cache until the next pass.
        self.limit = min(decoding.max_new_tokens, room - len(prompt_ids) + 1)
        self._decoding = decoding
        self._sampler = make_sampler(
            decoding.temperature, decoding.top_p, decoding.top_k, decoding.seed, decoding.min_p
        )
        self._seen = np.zeros(vocabulary.size, np.bool_)
        self._seen[list(prompt_ids)] = True
        self._constraint = (
            None
            if decoding.json_schema is None
            else JsonConstraint(vocabulary.for_grammars, decoding.json_schema)
        )
        self._reported: list[Token] = []
        self._given = 0  # of these, in chunks
        self._detokenizer = Detokenizer(vocabulary.tokenizer)
        self._splitter = SentenceSplitter()
        self._stops = StopMatcher(decoding.stop)
        self._generated = ""  # all text, also what is held back for stop strings
        self._text = ""  # what was given out
        self._finish_reason: FinishReason = "cancelled"  # until the answer ends by itself
        self._starts: list[_Start] = []
        self._begun = 0.0

    def start_clock(self) -> None:
        """From here on, unless it runs already, the first token is waited for."""
        self._begun = self._begun or perf_counter()

    def begin(self) -> None:
        """Routes on the prompt."""
        self.start_clock()
        self.fusion, confidence = self._route("")
        self._starts = [_Start(0, self.fusion, confidence)]

    def take(self, logits: npt.NDArray[np.floating]) -> list[Chunk]:
        """Samples the next token; returns the text that it completes, a chunk per sentence."""
        begun = perf_counter()
        if not np.isfinite(logits.max()):  # the largest of numbers among which is NaN is NaN
            raise NonFiniteError(
                f"the backbone's numbers are not finite after {len(self.tokens)} tokens",
                "Lower the adapters' weights, or export the bundle again",
            )
        token = self._choose(logits)
        if not self.tokens:
            self.spend(first_token=perf_counter() - self._begun)
        if token in self._ends:
            self._end("stop")
            return self.finish()
        self.tokens.append(token)
        piece = self._detokenizer.step(token)
        self._generated += piece
        self.changed = self._enter_sentences(self._splitter.feed(piece))
        text = self._stops.feed(piece)
        self.spend(decode=perf_counter() - begun)
        chunks = self._give(text)
        if self._stops.matched:
            self._end("stop")
        elif len(self.tokens) >= self.limit:
            self._end("length")
            chunks += self.finish()
        return chunks

    def finish(self) -> list[Chunk]:
        """The text that was held back, once no token follows."""
        rest = self._detokenizer.finish()
        return self._give(self._stops.feed(rest) + self._stops.finish())

    def reply(self) -> Reply:
        """The answer so far."""
        edges = [start.offset for start in self._starts] + [len(self._text)]
        sentences = tuple(
            Sentence(self._text[start.offset : end], dict(start.fusion), start.confidence)
            for start, end in zip(self._starts, edges[1:], strict=True)
            if start.offset < len(self._text)
        )
        usage = Usage(len(self.prompt_ids), len(self.tokens))
        tokens = tuple(self._reported)
        return Reply(self._text, sentences, usage, self.timings, self._finish_reason, tokens)

    def spend(self, **amounts: float) -> None:
        """Adds seconds and counts to the timings."""
        now = {key: getattr(self.timings, key) + amount for key, amount in amounts.items()}
        self.timings = replace(self.timings, **now)

    def _choose(self, logits: npt.NDArray[np.floating]) -> int:
        """The next token under the request's options."""
        decoding, wanted = self._decoding, logits
        if decoding.repetition_penalty != 1:
            wanted = penalise(wanted, self._seen, decoding.repetition_penalty)
        if self._constraint:
            wanted = self._constraint.allow(wanted)
        token = self._sampler(wanted)
        self._seen[token] = True
        if self._constraint:
            self._constraint.accept(token)
        if decoding.logprobs is not None and token not in self._ends:
            self._reported.append(self._report(token, logits, decoding.logprobs))
        return token

    def _report(self, token: int, logits: npt.NDArray[np.floating], count: int) -> Token:
        scores = log_probabilities(logits)
        best = np.argsort(-scores, kind="stable")[:count].tolist() if count else []
        top = tuple((id_, self._text_of(id_), float(scores[id_])) for id_ in best)
        return Token(token, self._text_of(token), float(scores[token]), top)

    def _text_of(self, token: int) -> str:
        text: str = self._vocabulary.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def _end(self, reason: FinishReason) -> None:
        self.done = True
        self._finish_reason = reason

    def _enter_sentences(self, offsets: list[int]) -> bool:
        """At the first token of a sentence: route on all text so far. True if the fusion changed.

        Of several starts inside one token only the last is routed: nothing more is generated for
        the others.
        """
        if not offsets:
            return False
        before = self._starts[-1]
        self._starts += [replace(before, offset=offset) for offset in offsets]
        if isinstance(self._steering, Pinned) or self._steering.every == "prompt":
            return False
        self.fusion, confidence = self._route(self._generated)
        self._starts[-1] = _Start(offsets[-1], self.fusion, confidence)
        if self.fusion == before.fusion:
            return False
        self.spend(switches=1)
        return True

    def _route(self, generated: str) -> tuple[dict[str, float], float | None]:
        if isinstance(self._steering, Pinned):
            return self._steering.weights, None
        begun = perf_counter()
        decision = self._steering.decide(self._user_text, generated, self._decided)
        self._decided = decision
        self.spend(router=perf_counter() - begun, routings=1)
        return decision.weights, decision.confidence

    def _give(self, text: str) -> list[Chunk]:
        """Adds text to the answer, as one chunk per sentence."""
        return list(self._chunks(text))

    def _chunks(self, text: str) -> Iterator[Chunk]:
        start, end = len(self._text), len(self._text) + len(text)
        self._text += text
        cuts = [at.offset for at in self._starts if start < at.offset < end]
        for left, right in zip([start, *cuts], [*cuts, end], strict=True):
            if left < right:
                index = max(i for i, at in enumerate(self._starts) if at.offset <= left)
                tokens = tuple(self._reported[self._given :])
                self._given = len(self._reported)
                fusion = dict(self._starts[index].fusion)  # the consumer's own
                yield Chunk(self._text[left:right], index, fusion, tokens)
