"""Requests of several threads, answered side by side: each as if it were alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlp_edge import BundleError, BusyError, ResourceError, Runtime, UsageError
from dlp_edge.errors import NonFiniteError
from dlp_edge.runtime.batching.batch import CHUNK_BESIDE
from dlp_edge.runtime.engine import decoder
from dlp_edge.runtime.engine.decoder import Decoder
from dlp_edge.types import Activity, RouteDecision

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}},
    "required": ["name"],
    "additionalProperties": False,
}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("Hi", {"adapters": {}}),
    ("Tom has 3 apples and buys 4. How many?", {}),
    ("Select the name of row 7", {"kv": "recompute"}),
    ("Write an email to Ann about day 12. " * 6, {"adapters": {"email": 0.5, "sql": 0.5}}),
    ("Say it", {"temperature": 1.5, "seed": 3, "kv": "recompute"}),
    ("x" * 200, {"adapters": "sums", "temperature": 0.8, "top_p": 0.9, "seed": 1}),
    ("Who is it?", {"json_schema": SCHEMA, "temperature": 1.0, "seed": 2}),
    ("What now? And then?", {"stop": ["e"], "adapters": "sql"}),
    ("Tom has 13 apples and buys 40.", {"repetition_penalty": 1.5}),
    ("And then?", {"speculate": True, "repetition_stop": False}),
]
LONG: dict[str, Any] = {"adapters": {}, "max_new_tokens": 100, "repetition_stop": False}


@pytest.fixture(scope="module")
def runtime(either_bundle: Path) -> Iterator[Runtime]:
    with Runtime(either_bundle, threads=1) as runtime:
        yield runtime


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take their time, so that there is a middle of an answer."""
    step = Decoder.step

    def slow_step(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.002)
        return step(*arguments, **options)

    monkeypatch.setattr(Decoder, "step", slow_step)


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true within some seconds."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def side_by_side(asks: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(asks)) as pool:
        return [future.result() for future in [pool.submit(ask) for ask in asks]]


def generate(runtime: Runtime, prompt: str, options: dict[str, Any]) -> Any:
    reply = runtime.generate(prompt, **{"max_new_tokens": 60, **options})
    return reply.text, reply.sentences, reply.usage, reply.finish_reason


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_each_is_answered_as_if_alone(either_bundle: Path, rows: int) -> None:
    with Runtime(either_bundle, threads=1, max_parallel=rows) as runtime:
        alone = [generate(runtime, *asked) for asked in ASKED]
        for _ in range(2):
            asks = [lambda asked=asked: generate(runtime, *asked) for asked in ASKED * 2]
            assert side_by_side(asks) == alone * 2
        assert runtime.activity == Activity(0, 0)


@pytest.mark.usefixtures("slow")
def test_others_join_and_leave_while_one_is_under_way(runtime: Runtime) -> None:
    whole = runtime.generate("a", **LONG).text
    alone = [generate(runtime, *asked) for asked in ASKED]
    stream = runtime.stream("a", **LONG)
    text = "".join(next(stream).text for _ in range(3))
    found = side_by_side([lambda asked=asked: generate(runtime, *asked) for asked in ASKED])
    text += "".join(chunk.text for chunk in stream)
    assert (text, found) == (whole, alone)
    assert stream.reply.text == whole


def test_who_reads_nothing_holds_nobody_up(runtime: Runtime) -> None:
    held = [runtime.stream("a", **LONG) for _ in range(3)]
    first = [next(stream).text for stream in held]
    assert generate(runtime, "Say it", {"max_new_tokens": 100})
    whole = [text + "".join(c.text for c in s) for text, s in zip(first, held, strict=True)]
    assert whole == [runtime.generate("a", **LONG).text] * 3


@pytest.mark.usefixtures("slow")
def test_a_cancelled_request_ends_and_no_other(runtime: Runtime) -> None:
    alone = runtime.generate("a", **LONG).text
    streams = [runtime.stream("a", **LONG) for _ in range(4)]
    texts: dict[int, str] = {}

    def read(index: int) -> None:
        texts[index] = next(streams[index]).text
        if index % 2:
            streams[index].cancel()
        texts[index] += "".join(chunk.text for chunk in streams[index])

    side_by_side([lambda index=index: read(index) for index in range(4)])
    assert [texts[0], texts[2]] == [alone, alone]
    for index in (1, 3):
        reply = streams[index].reply
        assert reply.finish_reason == "cancelled"
        assert reply.text == texts[index]
        assert alone.startswith(reply.text.rstrip("\ufffd"))
        assert reply.usage.completion_tokens < LONG["max_new_tokens"]


@pytest.mark.usefixtures("slow")
def test_an_abandoned_request_gives_its_place_up(runtime: Runtime) -> None:
    alone = runtime.generate("a", **LONG).text

    def leave() -> None:
        with runtime.stream("a", **LONG) as stream:
            next(stream)

    found = side_by_side([leave, lambda: runtime.generate("a", **LONG).text, leave])
    assert found[1] == alone
    assert soon(lambda: runtime.activity == Activity(0, 0))


@pytest.mark.usefixtures("slow")
def test_what_fails_in_one_answer_is_no_concern_of_the_others(runtime: Runtime) -> None:
    alone = runtime.generate("a", **LONG).text

    def explode(decision: RouteDecision, text: str) -> None:
        raise RuntimeError("boom")

    def fail(**options: Any) -> Any:
        with pytest.raises((RuntimeError, UsageError)) as caught:
            runtime.generate("Tom has 3", **options)
        return type(caught.value)

    found = side_by_side(
        [
            lambda: runtime.generate("a", **LONG).text,
            lambda: fail(on_route=explode),
            lambda: fail(on_route=lambda decision, text: "nobody"),
            lambda: runtime.generate("a", **LONG).text,
        ]
    )
    assert found == [alone, RuntimeError, UsageError, alone]


@pytest.mark.usefixtures("slow")
def test_numbers_that_are_not_finite_end_one_answer(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = runtime.generate("a", **LONG).text
    step, spoiled = Decoder.step, []

    def spoil(decoder: Decoder, tokens: Sequence[int], *rest: Any) -> Any:
        logits = step(decoder, tokens, *rest)
        if len(tokens) == 3 and not spoiled:
            spoiled.append(True)
            logits[1] = np.nan
        return logits

    monkeypatch.setattr(Decoder, "step", spoil)

    def ask() -> str:
        try:
            return runtime.generate("a", **LONG).text
        except NonFiniteError:
            return "failed"

    assert sorted(side_by_side([ask] * 3)) == sorted([alone, alone, "failed"])


@pytest.mark.usefixtures("slow")
def test_an_engine_that_fails_ends_all_and_serves_the_next(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = runtime.generate("a", **LONG).text
    step = Decoder.step

    def fail(decoder: Decoder, tokens: Sequence[int], *rest: Any) -> Any:
        if len(tokens) == 3:
            raise BundleError("the engine failed", "Try again")
        return step(decoder, tokens, *rest)

    def ask() -> Any:
        with pytest.raises(BundleError, match="the engine failed"):
            runtime.generate("a", **LONG)

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "step", fail)
        side_by_side([ask] * 3)
    assert side_by_side([lambda: runtime.generate("a", **LONG).text] * 3) == [alone] * 3


@pytest.mark.usefixtures("slow")
def test_a_long_prompt_is_read_between_the_steps_of_others(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str | int] = []
    step, prefill = Decoder.step, Decoder.prefill

    def watched_step(decoder: Decoder, tokens: Sequence[int], *rest: Any) -> Any:
        events.append("step")
        return step(decoder, tokens, *rest)

    def watched_prefill(decoder: Decoder, ids: Sequence[int], *rest: Any) -> Any:
        events.append(len(ids))
        return prefill(decoder, ids, *rest)

    stream = runtime.stream("a", **LONG)
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "step", watched_step)
        patched.setattr(Decoder, "prefill", watched_prefill)
        runtime.generate("x" * 400, adapters={}, max_new_tokens=2)
    stream.close()
    sizes = [event for event in events if event != "step"]
    assert len(sizes) > 5
    assert max(sizes) <= CHUNK_BESIDE
    read = [index for index, event in enumerate(events) if event != "step"]
    assert all(after - before == 2 for before, after in pairwise(read))


def test_first_come_first_served(tiny_bundle: Path) -> None:
    begun: list[int] = []
    with Runtime(tiny_bundle, threads=1, max_parallel=2) as runtime, ThreadPoolExecutor(6) as pool:
        runtime._scheduler.acquire(lambda: False)
        for index in range(6):

            def note(decision: RouteDecision, text: str, index: int = index) -> None:
                begun.extend([index] if not text else [])

            options: dict[str, Any] = {"on_route": note, "max_new_tokens": 5}
            pool.submit(runtime.generate, "Hello", **options)
            assert soon(lambda index=index: runtime.activity.waiting == index + 1)
        runtime._scheduler.release()
    assert begun == [0, 1, 2, 3, 4, 5]


def test_conversations_side_by_side_keep_their_caches(runtime: Runtime) -> None:
    def talk(word: str) -> list[tuple[str, bool]]:
        chat = runtime.session()
        replies = [chat.send(f"{word} {n}", adapters="sums", max_new_tokens=20) for n in range(3)]
        return [(reply.text, reply.timings.reused > 0) for reply in replies]

    words = ["apples", "rows", "letters", "days"]
    alone = [talk(word) for word in words]
    assert [reused for _, reused in alone[0]] == [False, True, True]
    assert side_by_side([lambda word=word: talk(word) for word in words]) == alone


@pytest.mark.usefixtures("slow")
def test_who_needs_the_engine_alone_waits_and_is_waited_for(runtime: Runtime) -> None:
    alone = runtime.generate("a", **LONG).text
    score = runtime.score("Hi", ["there"], adapters={})
    batch = [reply.text for reply in runtime.generate_batch(["a"] * 2, **LONG)]

    def late(ask: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (time.sleep(0.05), ask())[1]

    found = side_by_side(
        [
            lambda: runtime.generate("a", **LONG).text,
            lambda: runtime.generate("a", **LONG).text,
            late(lambda: runtime.score("Hi", ["there"], adapters={})),
            late(lambda: [r.text for r in runtime.generate_batch(["a"] * 2, **LONG)]),
            late(lambda: runtime.generate("a", **LONG).text),
        ]
    )
    assert found == [alone, alone, score, batch, alone]


def test_who_waited_for_it_goes_on_at_once(runtime: Runtime) -> None:
    runtime.generate("Hi", adapters={}, max_new_tokens=1)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(20):
            runtime._scheduler.acquire(lambda: False)
            asked = pool.submit(runtime.generate, "Hi", adapters={}, max_new_tokens=1)
            assert soon(lambda: runtime.activity.waiting == 1)
            released = time.monotonic()
            runtime._scheduler.release()
            asked.result()
    assert time.monotonic() - released < 0.9  # no consumer looks more often without news


@pytest.mark.usefixtures("slow")
def test_closing_ends_all(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle, threads=1)
    replies: list[Any] = []
    threads = [
        threading.Thread(target=lambda: replies.append(runtime.generate("a", **LONG)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    while runtime.activity.running < 3:
        time.sleep(0.001)
    engine = runtime._scheduler._thread
    runtime.close()
    for thread in threads:
        thread.join(10)
    assert {reply.finish_reason for reply in replies} == {"cancelled"}
    assert engine is not None
    assert not engine.is_alive()


def test_a_callback_cannot_wait_for_its_own_engine(runtime: Runtime) -> None:
    def ask(decision: RouteDecision, text: str) -> None:
        runtime.generate("Hi", adapters={}, max_new_tokens=1)

    with runtime.stream("a", **LONG) as stream:
        next(stream)
        with pytest.raises(BusyError):
            runtime.generate("Tom has 3", on_route=ask)


def test_memory_that_runs_out_for_a_second_request_is_no_concern_of_the_first(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = runtime.generate("a", **LONG).text
    assert soon(lambda: runtime._scheduler._thread is None)  # and its caches are gone
    stream = runtime.stream("a", **LONG)
    text = next(stream).text

    def no_room(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(decoder, "make_cache", no_room)
        with pytest.raises(ResourceError, match="out of memory"):
            runtime.generate("Hello", adapters={})
    assert text + "".join(chunk.text for chunk in stream) == alone
