"""Several requests in one prompt, each answered as if asked alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Runtime, UsageError
from dlp_edge.errors import ContextLengthError
from dlp_edge.runtime.batching import scheduler
from dlp_edge.runtime.decoding.request_answers import SEPARATOR
from dlp_edge.runtime.routing.request_splitter import RequestSpan, Split
from tests.testing.paths import KEPT

OPTIONS: Any = {"max_new_tokens": 6, "repetition_stop": False}
PROMPT = "Hello there | What is 2 plus 3 | Write to Ann"


class BarSplitter:
    """Splits at bars; a request that begins with `that` leans, one with `given` introduces."""

    def split(self, text: str) -> Split:
        spans, introduction, at = [], None, 0
        for part in text.split("|"):
            start = at + len(part) - len(part.lstrip())
            end = at + len(part.rstrip())
            if part.strip().startswith("given"):
                introduction = (start, end)
            elif part.strip():
                spans.append(RequestSpan(start, end, part.strip().startswith("that")))
            at += len(part) + 1
        if len(spans) < 2:
            return Split((RequestSpan(0, len(text)),))
        return Split(tuple(spans), introduction)


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle, max_context=160) as loaded:
        assert loaded._loaded is not None
        splitter: Any = BarSplitter()
        loaded._loaded = replace(loaded._loaded, splitter=splitter)
        yield loaded


def alone(runtime: Runtime, prompt: Any, **options: Any) -> str:
    return runtime.generate(prompt, **{**OPTIONS, **options}).text


def test_each_is_answered_as_if_asked_alone(runtime: Runtime) -> None:
    reply = runtime.generate(PROMPT, requests="auto", **OPTIONS)
    asked = PROMPT.split(" | ")
    assert [request.text for request in reply.requests] == asked
    assert [request.answer for request in reply.requests] == [alone(runtime, a) for a in asked]
    assert reply.text == SEPARATOR.join(request.answer for request in reply.requests)
    assert reply.usage.completion_tokens == 18
    assert reply.finish_reason == "length"
    for request in reply.requests:
        assert PROMPT[request.start : request.end] == request.text
        assert request.decision == runtime.route(request.text)


def test_the_next_prompt_need_not_wait_until_the_engine_thread_ends(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.generate(PROMPT, requests="apart", **OPTIONS)
    for name in ("LINGER", "PATIENCE"):
        monkeypatch.setattr(scheduler, name, 60)
    asked = {"requests": "apart", **OPTIONS}
    for _ in range(2):  # the thread of the first has waited since before the change
        asking = threading.Thread(
            target=runtime.generate, args=(PROMPT,), kwargs=asked, daemon=True
        )
        asking.start()
        asking.join(20)
        assert not asking.is_alive()


def test_chunks_come_in_order_and_make_the_text(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, requests="auto", logprobs=1, **OPTIONS)
    chunks = list(stream)
    reply = stream.reply
    assert "".join(chunk.text for chunk in chunks) == reply.text
    assert [chunk.request for chunk in chunks] == sorted(chunk.request for chunk in chunks)
    assert [chunk.sentence for chunk in chunks] == sorted(chunk.sentence for chunk in chunks)
    assert {sentence.request for sentence in reply.sentences} == {0, 1, 2}
    assert "".join(sentence.text for sentence in reply.sentences) == reply.text
    assert len(reply.tokens) == 18


def test_a_prompt_of_one_request_changes_nothing(runtime: Runtime) -> None:
    whole = runtime.generate("Hello there", **OPTIONS)
    auto = runtime.generate("Hello there", requests="auto", **OPTIONS)
    assert (auto.text, auto.sentences, auto.usage) == (whole.text, whole.sentences, whole.usage)
    assert auto.requests == whole.requests == ()


def test_together_is_the_default(runtime: Runtime) -> None:
    assert runtime.generate(PROMPT, **OPTIONS).requests == ()


def test_a_request_that_leans_is_a_further_turn(runtime: Runtime) -> None:
    reply = runtime.generate("Hello there | that again | What is 2", requests="auto", **OPTIONS)
    first, leaning, last = reply.requests
    assert leaning.leans_on == 0
    conversation = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": "that again"},
    ]
    assert leaning.answer == alone(runtime, conversation)
    assert last.answer == alone(runtime, "What is 2")


def test_apart_takes_none_as_leaning(runtime: Runtime) -> None:
    reply = runtime.generate("Hello there | that again", requests="apart", **OPTIONS)
    assert [request.leans_on for request in reply.requests] == [None, None]
    assert reply.requests[1].answer == alone(runtime, "that again")


def test_all_see_the_introduction_the_history_and_the_system_message(runtime: Runtime) -> None:
    system = {"role": "system", "content": "Be brief"}
    prompt = [system, {"role": "user", "content": "given a table | Hello there | What is 2"}]
    reply = runtime.generate(prompt, requests="auto", **OPTIONS)
    for request in reply.requests:
        asked = [system, {"role": "user", "content": f"given a table\n{request.text}"}]
        assert request.answer == alone(runtime, asked)


def test_twenty_requests_are_served_in_waves(runtime: Runtime) -> None:
    asked = [f"What is {number}" for number in range(20)]
    reply = runtime.generate(" | ".join(asked), requests="auto", **OPTIONS)
    assert [request.answer for request in reply.requests] == [alone(runtime, a) for a in asked]


def test_cancelling_keeps_what_was_given_out(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, requests="auto", max_new_tokens=30, repetition_stop=False)
    given = next(stream).text
    stream.cancel()
    given += "".join(chunk.text for chunk in stream)
    assert stream.reply.text == given
    assert stream.reply.finish_reason == "cancelled"
    assert [request.answer for request in stream.reply.requests][1:] == ["", ""]
    assert runtime.generate("Hello there", **OPTIONS).text


def test_closing_in_the_middle_frees_the_runtime(runtime: Runtime) -> None:
    with runtime.stream(PROMPT, requests="auto", **OPTIONS) as stream:
        next(stream)
    assert runtime.generate("Hello there", wait=False, **OPTIONS).text


def test_what_fills_the_context(runtime: Runtime) -> None:
    with pytest.raises(ContextLengthError):
        runtime.generate("Hello | " + "word " * 400, requests="auto", **OPTIONS)
    long = "Hello there " * 6
    reply = runtime.generate(
        f"{long} | that again {long}", requests="auto", max_new_tokens=120, repetition_stop=False
    )
    first, second = reply.requests
    assert (second.answer, second.finish_reason) == ("", "length")
    assert reply.text == first.answer


def test_seeds_repeat_all_answers(runtime: Runtime) -> None:
    reply = runtime.generate(PROMPT, requests="auto", temperature=1.0, **OPTIONS)
    again = runtime.generate(PROMPT, requests="auto", temperature=1.0, seed=reply.seed, **OPTIONS)
    assert again.text == reply.text


def test_pinned_adapters_and_schemas_answer_whole(runtime: Runtime) -> None:
    assert runtime.generate(PROMPT, requests="auto", adapters="sums", **OPTIONS).requests == ()
    reply = runtime.generate(PROMPT, requests="apart", adapters="sums", **OPTIONS)
    assert {sentence.fusion["sums"] for sentence in reply.sentences} == {1.0}
    assert [request.decision for request in reply.requests] == [None] * 3


def test_a_session_keeps_one_history(runtime: Runtime) -> None:
    session = runtime.session()
    reply = session.send(PROMPT, requests="auto", **OPTIONS)
    assert [message["content"] for message in session.messages] == [PROMPT, reply.text]
    assert session.send("Hello", **OPTIONS).usage.prompt_tokens > reply.usage.completion_tokens


def test_requests_without_answers(runtime: Runtime) -> None:
    found = runtime.requests("Hello there | that again")
    assert [(each.text, each.leans_on) for each in found] == [
        ("Hello there", None),
        ("that again", 0),
    ]
    (whole,) = runtime.requests("  Hello there ")
    assert (whole.text, whole.start, whole.end) == ("  Hello there ", 0, 14)


def test_a_bundle_without_a_splitter() -> None:
    with Runtime(KEPT, max_context=160) as runtime:
        assert runtime.generate(PROMPT, requests="auto", **OPTIONS).requests == ()
        assert len(runtime.requests(PROMPT)) == 1
        with pytest.raises(UsageError, match="no request splitter"):
            runtime.generate(PROMPT, requests="apart", **OPTIONS)


def test_wrong_options(runtime: Runtime) -> None:
    wrong: Any = "split"
    with pytest.raises(UsageError, match="together, apart, auto"):
        runtime.generate(PROMPT, requests=wrong)
    with pytest.raises(UsageError, match="whole"):
        runtime.generate_batch([PROMPT], requests="apart")
