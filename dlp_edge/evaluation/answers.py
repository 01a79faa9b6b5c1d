"""Generates answers with a `Runtime`, and records their routing and timing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from dlp_edge.evaluation.questions import Question, System
from dlp_edge.runtime.options import GenerateOptions
from dlp_edge.runtime.runtime import Runtime
from dlp_edge.types import Reply, RouteDecision


@dataclass(frozen=True)
class Decision:
    """A routing decision: the most probable adapter, its probability, the confidence, and the
    resulting fusion weights."""

    top: str
    probability: float
    confidence: float
    weights: dict[str, float]


@dataclass(frozen=True)
class Answered:
    """An answer with its routing and timing.

    Attributes:
        sentences: (text, fusion) of each.
        decisions: one per routing step; empty if adapters are pinned.
        prompt_tokens: including the chat template.
        clock: seconds from the request to each token, including routing and fusion; empty for
            answers generated in a batch.
        seconds: from the request to the end of the answer; in a batch, its share.
        router, switch, recompute: seconds, as in `Timings`.
    """

    text: str
    sentences: tuple[tuple[str, dict[str, float]], ...]
    decisions: tuple[Decision, ...]
    prompt_tokens: int
    new_tokens: int
    clock: tuple[float, ...]
    seconds: float
    router: float
    switch: float
    recompute: float
    routings: int
    switches: int
    finish_reason: str

    def record(self) -> dict[str, Any]:
        """As JSON."""
        document = asdict(self)
        document["clock"] = [round(seconds, 5) for seconds in self.clock]
        return document

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Answered:
        sentences = tuple((text, fusion) for text, fusion in record["sentences"])
        decisions = tuple(Decision(**decision) for decision in record["decisions"])
        whole = {"sentences": sentences, "decisions": decisions, "clock": tuple(record["clock"])}
        return cls(**{**record, **whole})

    def seconds_to(self, tokens: int) -> float:
        """Seconds from the request to this many tokens, or to the end if there are fewer."""
        return self.clock[tokens - 1] if 0 < tokens <= len(self.clock) else self.seconds


def ask(runtime: Runtime, question: Question, system: System) -> Answered:
    """Generate one greedy answer, timed token by token."""
    decisions: list[Decision] = []
    start = perf_counter()
    stream = runtime.stream(question.prompt, **_options(question, system, decisions))
    clock: list[float] = []
    for _ in stream:
        now = perf_counter() - start
        count = stream.reply.usage.completion_tokens
        clock += [now] * (count - len(clock))  # tokens held back until this one
    seconds = perf_counter() - start
    reply = stream.reply
    clock += [seconds] * (reply.usage.completion_tokens - len(clock))
    return _answered(reply, decisions, clock, seconds)


def ask_batch(
    runtime: Runtime, questions: Sequence[Question], systems: Sequence[System]
) -> list[Answered]:
    """Generate greedy answers as a batch; each is charged an equal share of the batch's time."""
    decisions: list[list[Decision]] = [[] for _ in questions]
    options = [_options(*each) for each in zip(questions, systems, decisions, strict=True)]
    prompts = [question.prompt for question in questions]
    start = perf_counter()
    replies = runtime.generate_batch(prompts, options, max_batch=len(prompts))
    seconds = (perf_counter() - start) / len(prompts)
    return [
        _answered(reply, made, (), seconds) for reply, made in zip(replies, decisions, strict=True)
    ]


def _options(question: Question, system: System, decisions: list[Decision]) -> GenerateOptions:
    """A system's options, plus a callback that records routing decisions."""

    def listen(decision: RouteDecision, generated: str) -> None:
        decisions.append(_decision(decision))

    own: GenerateOptions = {"max_new_tokens": question.room, "on_route": listen}
    return {**system.options, **own}


def _answered(
    reply: Reply, decisions: Sequence[Decision], clock: Sequence[float], seconds: float
) -> Answered:
    times = reply.timings
    return Answered(
        text=reply.text,
        sentences=tuple((sentence.text, sentence.fusion) for sentence in reply.sentences),
        decisions=tuple(decisions),
        prompt_tokens=reply.usage.prompt_tokens,
        new_tokens=reply.usage.completion_tokens,
        clock=tuple(clock),
        seconds=seconds,
        router=times.router,
        switch=times.switch,
        recompute=times.recompute,
        routings=times.routings,
        switches=times.switches,
        finish_reason=reply.finish_reason,
    )


def _decision(decision: RouteDecision) -> Decision:
    top = max(decision.probabilities, key=lambda name: decision.probabilities[name], default="")
    probability = decision.probabilities.get(top, 0.0)
    return Decision(top, probability, decision.confidence, dict(decision.weights))
