"""PromptLookup are guesses: with them an answer is what it is without, in fewer passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dlp_edge import Runtime
from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.errors import NonFiniteError, UsageError
from dlp_edge.runtime.decoding import prompt_lookup as drafts
from dlp_edge.runtime.decoding.answer import Answer, Vocabulary
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.decoding.loop import stream_answer
from dlp_edge.runtime.decoding.prompt_lookup import GRAM, PromptLookup
from dlp_edge.runtime.engine.backbone import VERIFY_TOKENS
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.request import Decoding
from dlp_edge.runtime.routing.policy import Routed
from dlp_edge.runtime.routing.router import Classification
from dlp_edge.types import Chunk, Reply
from tests.testing.paths import DATA

EOS = 256
TOKENIZER = Tokenizer.from_file(str(DATA / "bytes.json"))


# The guesses alone


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=60))
def test_a_draft_is_what_followed_the_place_that_the_text_is_like(
    prompt: list[int], answer: list[int]
) -> None:
    """By a slow second opinion, which looks through the whole text at every token."""
    drafts, text, source = PromptLookup(prompt), list[int](), None
    for place, token in enumerate(prompt + answer):
        source = source + 1 if source is not None and text[source] == token else None
        text.append(token)
        if source is None:
            source = _last_seen(text)
        if place < len(prompt):
            continue
        draft = drafts.propose(answer[: place + 1 - len(prompt)], 9)
        if draft:
            assert len(draft) == 9
            assert source is not None
            for guess in draft:
                repeated = [*text, *draft][source]
                assert guess == repeated
                source += 1
            source -= len(draft)


def _last_seen(text: list[int]) -> int | None:
    """Where the last GRAM tokens of a text ended before."""
    ends = range(len(text) - 1, 0, -1)
    return next((e for e in ends if text[max(0, e - GRAM) : e] == text[-GRAM:]), None)


@given(st.integers(1, 5), st.integers(0, 20))
def test_a_loop_is_drafted_round_and_round(period: int, most: int) -> None:
    loop = [i % period for i in range(60)]
    assert PromptLookup([]).propose(loop, most) == [i % period for i in range(60, 60 + most)]


def test_new_text_is_not_guessed() -> None:
    drafts = PromptLookup(range(100))
    assert all(drafts.propose(range(100, end), 9) == [] for end in range(101, 200))


def test_guesses_that_fail_are_given_up_and_taken_up_again() -> None:
    """The text after each "1 2 3" is another one, then a loop."""
    failing = [token for i in range(30) for token in (1, 2, 3, 100 + i)]
    drafts = PromptLookup([])
    for end in range(len(failing)):
        assert drafts.propose(failing[:end], 9) == []
    assert len(drafts.propose(failing + [1, 2, 3] * 20, 9)) == 9


# The loop, with a backbone that says what it is told to


class ToldDecoder:
    """Says the bytes of a text, another one under each fusion; after a token that stands in none
    of them nonsense that depends on all it has read. Its cache is the tokens, each with the
    fusion that it was read under."""

    can_verify = True

    def __init__(self, texts: Mapping[str, str], prompt: Sequence[int], max_context: int) -> None:
        self.scripts = {name: [*TOKENIZER.encode(text).ids, EOS] for name, text in texts.items()}
        self.start = len(prompt)
        self.cache: list[tuple[int, str]] = []
        self.labels: list[Any] = [None]
        self.max_context = max_context
        self.can_verify = True
        self.passes = 0

    @property
    def lengths(self) -> list[int]:
        return [len(self.cache)]

    def set_fusion(self, fusion: Mapping[str, float]) -> None:
        (self.fusion,) = fusion

    def truncate(self, length: int, sequence: int = 0) -> None:
        del self.cache[length:]

    def prefill(self, ids: Sequence[int], sequence: int, interrupt: Interrupt) -> Any:
        return self.verify(ids, interrupt)[-1]

    def step(self, tokens: Sequence[int], interrupt: Interrupt) -> Any:
        assert len(tokens) == 1
        return self.verify(tokens, interrupt)

    def verify(self, ids: Sequence[int], interrupt: Interrupt) -> Any:
        interrupt.check()
        self.passes += 1
        rows = []
        for token in ids:
            self.cache.append((token, self.fusion))
            rows.append(self._logits())
        return np.stack(rows)

    def _logits(self) -> Any:
        logits = np.zeros(EOS + 1, np.float32)
        at = len(self.cache) - self.start
        script = self.scripts[self.fusion]
        told = at <= 0 or any(self.cache[-1][0] in s[at - 1 : at] for s in self.scripts.values())
        if told:
            logits[script[min(max(at, 0), len(script) - 1)]] = 2.5
        else:
            logits[65 + crc32(repr(self.cache).encode()) % 5] = 2.5
        return logits


class PassThroughFuser:
    def fuse(self, weights: Mapping[str, float], sequence: int) -> Mapping[str, float]:
        return weights


class KeywordRouter:
    """Routes to `b` where the newest sentence begins with B, else to `a`."""

    labels = ("a", "b")

    def __init__(self) -> None:
        self.seen: list[str] = []

    def classify(self, prompt: str, generated: str = "") -> Classification:
        self.seen.append(generated)
        b = 0.99 if generated.endswith("B") else 0.01
        return Classification({"a": 1 - b, "b": b}, doubt=0.0)


@dataclass
class Told:
    """An answer by the told backbone."""

    decoder: ToldDecoder
    router: KeywordRouter
    answer: Answer
    interrupt: Interrupt

    def run(self) -> Iterator[Chunk]:
        engine = Engine(self.decoder, PassThroughFuser())  # type: ignore[arg-type]
        return stream_answer(engine, self.answer, self.interrupt)

    def outcome(self) -> tuple[Any, ...]:
        """All of it but the time that it took and the number of passes."""
        chunks = list(self.run())
        reply = self.answer.reply()
        times = reply.timings
        return (
            chunks,
            replace(reply, timings=type(times)()),
            (times.routings, times.switches),
            self.router.seen,
            self.decoder.cache,
        )


def tell(
    texts: Mapping[str, str], decoding: Decoding, prompt: str = "question", room: int = 1000
) -> Told:
    ids = TOKENIZER.encode(prompt).ids
    decoder, router = ToldDecoder(texts, ids, room), KeywordRouter()
    policy = Routed(router, SelectionRule("top_k", k=1))  # type: ignore[arg-type]
    vocabulary = Vocabulary(TOKENIZER, EOS + 1, frozenset({EOS}))
    answer = Answer(vocabulary, ids, "question", decoding, policy, room)
    return Told(decoder, router, answer, Interrupt())


PIECES = st.lists(
    st.sampled_from(["One two three. ", "B two three. ", "one two ", "Bee", "\n", "é😀", ". "]),
    max_size=12,
).map("".join)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    texts=st.fixed_dictionaries({"a": PIECES, "b": PIECES}),
    prompt=PIECES.map(lambda text: "? " + text),
    kv=st.sampled_from(["keep", "recompute"]),
    limit=st.integers(1, 120),
    room=st.integers(0, 150),
    stop=st.sampled_from([(), ("three",), ("o t",), ("\n", "Be")]),
    penalty=st.sampled_from([1.0, 1.3]),
    logprobs=st.sampled_from([None, 2]),
    temperature=st.sampled_from([0.0, 0.3]),
)
def test_the_answer_is_the_same(
    texts: dict[str, str],
    prompt: str,
    kv: Any,
    limit: int,
    room: int,
    stop: tuple[str, ...],
    penalty: float,
    logprobs: int | None,
    temperature: float,
) -> None:
    plain = Decoding(
        repetition_stop=False,
        max_new_tokens=limit,
        stop=stop,
        kv=kv,
        repetition_penalty=penalty,
        logprobs=logprobs,
        temperature=temperature,
        seed=1,
    )
    room += len(prompt.encode()) + 1
    without = tell(texts, plain, prompt, room)
    speculating = tell(texts, replace(plain, speculate=True), prompt, room)
    assert speculating.outcome() == without.outcome()
    assert speculating.decoder.passes <= without.decoder.passes


LOOP = "Say it. " * 12


def test_copied_text_takes_fewer_passes() -> None:
    told = tell({"a": LOOP}, Decoding(repetition_stop=False, speculate=True))
    text = "".join(chunk.text for chunk in told.run())
    times = told.answer.reply().timings
    assert text == LOOP
    assert times.decode_steps + times.accepted == len(LOOP)
    assert times.decode_steps == told.decoder.passes - 1 < len(LOOP) / 3
    assert 0 < times.accepted <= times.drafted


@pytest.mark.parametrize("kv", ["keep", "recompute"])
@pytest.mark.parametrize("place", range(VERIFY_TOKENS))
def test_a_fusion_that_changes_inside_a_draft_ends_it(kv: Any, place: int) -> None:
    """Both fusions say the same up to a B, where the answer copies the prompt; what the draft has
    behind it was read under the old fusion, which would have taken it."""
    said, rest = "One of the men is " + "t" * place + "all. B", "ad men are not."
    told = tell(
        {"a": said + rest, "b": said + "etter men are."},
        Decoding(repetition_stop=False, speculate=True, kv=kv),
        prompt=said + rest,
    )
    assert "".join(chunk.text for chunk in told.run()) == said + "etter men are."
    times = told.answer.reply().timings
    assert times.accepted > 10
    assert times.switches == 1
    under = [fusion for _, fusion in told.decoder.cache[told.decoder.start :]]
    old = "b" if kv == "recompute" else "a"
    assert under == [old] * (len(said) - 1) + ["b"] * len("Better men are.")


def test_a_stop_string_inside_a_draft_ends_the_answer() -> None:
    told = tell(
        {"a": LOOP + "Say it no more." + LOOP},
        Decoding(repetition_stop=False, speculate=True, stop=("no m",)),
    )
    assert "".join(chunk.text for chunk in told.run()) == LOOP + "Say it "
    assert len(told.decoder.cache) == told.decoder.start + len(LOOP + "Say it no m") - 1


def test_cancelling_inside_an_accepted_draft_ends_it_there() -> None:
    told = tell({"a": LOOP}, Decoding(repetition_stop=False, speculate=True))
    run = told.run()
    text = ""
    while told.answer.timings.accepted < 5:
        text += next(run).text
    passes = told.decoder.passes
    told.interrupt.set()
    assert list(run) == []
    assert told.decoder.passes == passes
    assert (told.answer.reply().text, told.answer.reply().finish_reason) == (text, "cancelled")
    assert len(told.decoder.cache) == told.decoder.start + len(text) - 1


def test_an_abandoned_draft_leaves_the_cache_as_far_as_the_answer_came() -> None:
    told = tell({"a": LOOP}, Decoding(repetition_stop=False, speculate=True))
    run = told.run()
    text = ""
    while told.answer.timings.accepted < 5:
        text += next(run).text
    run.close()  # type: ignore[attr-defined]
    assert len(told.decoder.cache) == told.decoder.start + len(text) - 1


def test_numbers_that_are_not_finite_inside_a_draft_empty_the_cache() -> None:
    told = tell({"a": LOOP}, Decoding(repetition_stop=False, speculate=True))
    sound = told.decoder._logits

    def broken() -> Any:
        return sound() * (np.nan if len(told.decoder.cache) > 70 else 1)

    told.decoder._logits = broken  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError):
        list(told.run())
    assert told.decoder.cache == []
    assert told.answer.timings.accepted > 0


# The whole runtime, with a backbone of random weights. Its answers seldom copy, so guesses are
# drafted wherever a token came before, right or wrong.

PROMPTS = ["Sums sums sums sums", "Select the name of row 7", "abcabcabcabcabcabc", "Tell me."]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"adapters": {}},
    {"adapters": {"sums": 0.6, "sql": 0.4}, "max_new_tokens": 150},
    {"kv": "recompute"},
    {"repetition_penalty": 1.05},
    {"logprobs": 1},
    {"temperature": 0.3, "seed": 5},
    {"temperature": 1.0, "seed": 6, "top_k": 2},
    {"stop": ["a", "e"]},
    {"select": "top_k", "k": 1, "route_every": "prompt"},
]


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with pytest.MonkeyPatch.context() as patch, Runtime(tiny_bundle, max_context=400) as loaded:
        patch.setattr(drafts, "GRAM", 1)
        patch.setattr(drafts, "WORTH", 0.0)
        yield loaded


def words_of(reply: Reply) -> tuple[Any, ...]:
    """What a reply says, without its times and the digits of its log probabilities."""
    tokens = [(t.id, pytest.approx(t.logprob, abs=1e-3)) for t in reply.tokens]
    switches = (reply.timings.routings, reply.timings.switches)
    return reply.text, reply.sentences, reply.usage, reply.finish_reason, tokens, switches


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_runtime_says_the_same(runtime: Runtime, options: dict[str, Any]) -> None:
    for prompt in PROMPTS:
        plain = runtime.generate(prompt, **{"max_new_tokens": 100, **options})
        decoder = runtime._open().engine.decoder
        written = list(decoder._written[0])
        cache = {
            name: rows.host[0, :, : len(written)].copy() for name, rows in decoder._cache.items()
        }
        reply = runtime.generate(prompt, **{"max_new_tokens": 100, **options}, speculate=True)
        assert words_of(reply) == words_of(plain)
        assert decoder._written[0] == written
        assert decoder.lengths[0] == len(written)
        for name, kept in cache.items():
            np.testing.assert_allclose(
                decoder._cache[name].host[0, :, : len(written)], kept, atol=1e-4
            )


def test_drafts_are_made_and_counted(runtime: Runtime) -> None:
    replies = [
        runtime.generate(prompt, adapters={}, max_new_tokens=150, speculate=True)
        for prompt in PROMPTS
    ]
    assert sum(reply.timings.drafted for reply in replies) > 100
    assert sum(reply.timings.accepted for reply in replies) > 10
    for reply in replies:
        steps = reply.timings.decode_steps + reply.timings.accepted
        assert steps in (reply.usage.completion_tokens - 1, reply.usage.completion_tokens)


def test_a_chat_keeps_its_cache(runtime: Runtime) -> None:
    turns = {}
    for speculate in (False, True):
        chat = runtime.session()
        chat.send("abcabcabcabcabc", adapters={}, max_new_tokens=60, speculate=speculate)
        second = chat.send("And on?", adapters={}, max_new_tokens=20, speculate=speculate)
        turns[speculate] = (second.text, second.timings.reused)
    assert turns[True] == turns[False]
    assert turns[True][1] > 10


def test_what_cannot_be_is_refused(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="a batch cannot speculate"):
        runtime.generate_batch(["a", "b"], speculate=True)
    with pytest.raises(UsageError, match="speculate is 3"):
        runtime.generate("a", speculate=3)  # type: ignore[arg-type]
