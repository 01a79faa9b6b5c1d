"""The generation loop with a scripted backbone: routing, sentences, stops, limits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.runtime.decoding.answer import Answer, Vocabulary
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.decoding.loop import stream_answer
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.request import Decoding, RoutingSchedule
from dlp_edge.runtime.routing.policy import Pinned, Routed, RoutingPolicy
from dlp_edge.runtime.routing.router import Classification
from dlp_edge.types import Chunk, Reply
from tests.testing.paths import DATA

EOS = 256
TOKENIZER = Tokenizer.from_file(str(DATA / "bytes.json"))


class ScriptedDecoder:
    """Says the bytes of an answer one after the other, and records what it was asked."""

    can_verify = True

    def __init__(self, answer: str) -> None:
        self.script = [*TOKENIZER.encode(answer).ids, EOS]
        self.said = 0
        self.lengths = [0]
        self.can_verify = True
        self.labels: list[Any] = [None]
        self.log: list[tuple[str, Any]] = []

    def set_fusion(self, fusion: Mapping[str, float]) -> None:
        self.log.append(("fuse", dict(fusion)))

    def truncate(self, length: int, sequence: int = 0) -> None:
        self.lengths[0] = min(self.lengths[0], length)

    def prefill(self, ids: Sequence[int], sequence: int, interrupt: Interrupt) -> Any:
        interrupt.check()
        self.lengths[0] += len(ids)
        self.log.append(("prefill", len(ids)))
        return self._logits(0)

    def step(self, tokens: Sequence[int], interrupt: Interrupt) -> Any:
        interrupt.check()
        assert tokens == [self.script[self.said]]
        self.lengths[0] += 1
        return self._logits(1)[None]

    def _logits(self, advance: int) -> Any:
        self.said += advance
        logits = np.zeros(EOS + 1, np.float32)
        logits[self.script[self.said]] = 1
        return logits


class PassThroughFuser:
    def fuse(self, weights: Mapping[str, float], sequence: int) -> Mapping[str, float]:
        return weights


class KeywordRouter:
    """Routes to `b` once the answer has an uppercase B, else to `a`."""

    labels = ("a", "b")

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def classify(self, prompt: str, generated: str = "") -> Classification:
        self.seen.append((prompt, generated))
        b = 0.9 if "B" in generated else 0.1
        return Classification({"a": 1 - b, "b": b}, doubt=0.0)


class Generation:
    """One answer by the scripted backbone."""

    def __init__(
        self, answer: str, policy: RoutingPolicy, decoding: Decoding | None = None, room: int = 1000
    ) -> None:
        self.decoder = ScriptedDecoder(answer)
        self.interrupt = Interrupt()
        vocabulary = Vocabulary(TOKENIZER, EOS + 1, frozenset({EOS}))
        self.answer = Answer(
            vocabulary, [1, 2, 3], "question", decoding or Decoding(), policy, room
        )

    def run(self) -> Iterator[Chunk]:
        engine = Engine(self.decoder, PassThroughFuser())  # type: ignore[arg-type]
        return stream_answer(engine, self.answer, self.interrupt)

    def reply(self) -> Reply:
        return self.answer.reply()

    def fusions(self) -> list[Any]:
        return [what for kind, what in self.decoder.log if kind == "fuse"]


def routed() -> tuple[Routed, KeywordRouter]:
    router = KeywordRouter()
    return Routed(router, SelectionRule()), router  # type: ignore[arg-type]


def test_routing_once_a_prompt() -> None:
    policy, router = routed()
    generation = Generation(
        "Ab cd. Bc d. End.", replace(policy, schedule=RoutingSchedule("prompt"))
    )
    list(generation.run())
    assert router.seen == [("question", "")]
    assert [(s.text, s.fusion) for s in generation.reply().sentences] == [
        ("Ab cd. ", {"a": 1.0}),
        ("Bc d. ", {"a": 1.0}),
        ("End.", {"a": 1.0}),
    ]


def test_inertia_holds_on_to_the_decision_before() -> None:
    """b is 0.1, then 0.9 and 0.9: half of the old makes 0.1, 0.5 and 0.7 of it."""
    policy, _ = routed()
    heard: list[float] = []
    listening = replace(
        policy,
        schedule=RoutingSchedule(inertia=0.5),
        on_route=lambda found, text: heard.append(found.probabilities["b"]),
    )
    list(Generation("Ab cd. Bc d. End.", listening).run())
    assert heard == pytest.approx([0.1, 0.5, 0.7])


@given(st.floats(0, 0.99), st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_inertia_mixes_what_all_sentences_said(inertia: float, said: list[float]) -> None:
    """p = (1 - i) p_new + i p_before, of probabilities and doubt; the first stands as it is."""
    policy, router = routed()
    before = None
    expected = said[0]
    for b in said:
        router.classify = lambda *_, b=b: Classification({"a": 1 - b, "b": b}, doubt=b)  # type: ignore[method-assign]
        before = replace(policy, schedule=RoutingSchedule(inertia=inertia)).decide(
            "question", "x", before
        )
        expected = (1 - inertia) * b + inertia * expected
        assert before.probabilities == pytest.approx({"a": 1 - expected, "b": expected})
        assert before.doubt == pytest.approx(expected)


def test_routes_at_the_prompt_and_at_the_first_token_of_every_sentence() -> None:
    policy, router = routed()
    generation = Generation("Ab cd. Bc d. End.", policy)
    chunks = list(generation.run())
    assert router.seen == [
        ("question", ""),
        ("question", "Ab cd. B"),
        ("question", "Ab cd. Bc d. E"),
    ]
    assert generation.fusions() == [{"a": 1.0}, {"b": 1.0}]
    reply = generation.reply()
    assert [(s.text, s.fusion) for s in reply.sentences] == [
        ("Ab cd. ", {"a": 1.0}),
        ("Bc d. ", {"b": 1.0}),
        ("End.", {"b": 1.0}),
    ]
    assert "".join(chunk.text for chunk in chunks) == reply.text == "Ab cd. Bc d. End."
    for chunk in chunks:
        assert chunk.fusion == reply.sentences[chunk.sentence].fusion
    assert reply.finish_reason == "stop"
    assert (reply.timings.routings, reply.timings.switches) == (3, 1)


def test_keep_prefills_once_and_recompute_again_at_a_change() -> None:
    for kv, prefills in (("keep", [3]), ("recompute", [3, 3 + len("Ab cd. ")])):
        generation = Generation("Ab cd. Bc d.", routed()[0], Decoding(kv=kv))  # type: ignore[arg-type]
        text = "".join(chunk.text for chunk in generation.run())
        assert text == "Ab cd. Bc d."
        assert [count for kind, count in generation.decoder.log if kind == "prefill"] == prefills


def test_time_that_the_consumer_takes_is_not_counted() -> None:
    generation = Generation("Ab cd.", Pinned({}))
    begun = time.perf_counter()
    for _ in generation.run():
        time.sleep(0.1)
    timings = generation.reply().timings
    assert timings.decode_steps == len("Ab cd.")
    assert timings.decode < (time.perf_counter() - begun) / 2


def test_pinned_adapters_are_never_routed() -> None:
    generation = Generation("Ab. Bc.", Pinned({"a": 0.5}))
    list(generation.run())
    assert generation.fusions() == [{"a": 0.5}]
    assert all(s.confidence is None for s in generation.reply().sentences)


@pytest.mark.parametrize(
    ("decoding", "text", "reason"),
    [
        (Decoding(max_new_tokens=4), "Ab c", "length"),
        (Decoding(stop=("cd",)), "Ab ", "stop"),
        (Decoding(stop=("xx",)), "Ab cd.", "stop"),
    ],
)
def test_ends(decoding: Decoding, text: str, reason: str) -> None:
    generation = Generation("Ab cd.", Pinned({}), decoding)
    assert "".join(chunk.text for chunk in generation.run()) == text
    assert generation.reply().text == text
    assert generation.reply().finish_reason == reason


def test_a_full_context_ends_the_answer() -> None:
    generation = Generation("Ab cd.", Pinned({}), room=5)
    list(generation.run())
    assert generation.decoder.lengths[0] <= 5
    assert generation.reply().finish_reason == "length"
    assert generation.reply().text == "Ab "


def test_cancel_ends_before_the_next_pass() -> None:
    generation = Generation("Ab cd.", Pinned({}))
    run = generation.run()
    next(run)
    generation.interrupt.set()
    assert list(run) == []
    assert generation.reply().finish_reason == "cancelled"
    assert generation.reply().text == "A"


def test_cancelled_before_it_began() -> None:
    generation = Generation("Ab cd.", Pinned({}))
    generation.interrupt.set()
    assert list(generation.run()) == []
    assert generation.reply().finish_reason == "cancelled"
    assert generation.reply().sentences == ()
    assert generation.decoder.log == []


def test_characters_of_several_tokens_stay_whole() -> None:
    generation = Generation("é😀 ok", Pinned({}))
    assert [chunk.text for chunk in generation.run()] == ["é", "😀", " ", "o", "k"]


class TestRepetition:
    def test_a_sentence_that_comes_three_times_ends_the_answer(self) -> None:
        generation = Generation("Well. " + "It is so. " * 20, Pinned({}))
        text = "".join(chunk.text for chunk in generation.run())
        assert text == "Well. " + "It is so. " * 3
        assert generation.reply().finish_reason == "repetition"
        assert generation.reply().text == text

    def test_so_does_a_block_of_sentences(self) -> None:
        generation = Generation("One is odd. Two is even.\n" * 9, Pinned({}))
        text = "".join(chunk.text for chunk in generation.run())
        assert text == "One is odd. Two is even.\n" * 3

    def test_not_where_the_request_says_so(self) -> None:
        script = "Hello! " * 12
        generation = Generation(script, Pinned({}), Decoding(repetition_stop=False))
        assert "".join(chunk.text for chunk in generation.run()) == script
        assert generation.reply().finish_reason == "stop"

    def test_a_stop_string_held_back_is_given_out(self) -> None:
        decoding = Decoding(stop=(" Yes. No",))
        generation = Generation("Yes. " * 9, Pinned({}), decoding)
        assert "".join(chunk.text for chunk in generation.run()) == "Yes. " * 3
        assert generation.reply().finish_reason == "repetition"

    @pytest.mark.parametrize(
        "text", ["Ho. Ho. Who. Ho. Ho. Me.", "---\n---\n---\n---\nYes", "1\n" * 8]
    )
    def test_other_answers_go_on(self, text: str) -> None:
        generation = Generation(text, Pinned({}))
        assert "".join(chunk.text for chunk in generation.run()) == text
