"""Conversations: history, what their caches keep, overflow, saving, threads of control."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlp_edge import BusyError, ContextLengthError, Runtime, UsageError
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.session import Session
from dlp_edge.types import Chunk


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle) as runtime:
        yield runtime


def engine_of(runtime: Runtime, session: Session) -> Engine:
    return runtime._open().caches.engine_of(session)


def cold(runtime: Runtime, session: Session, **options: object) -> str:
    """The answer to the last thing said, without any cache."""
    *history, _ = session.messages
    return runtime.generate(history, **options).text  # type: ignore[arg-type]


def test_later_turns_read_only_what_is_new_and_answer_as_cold_ones(runtime: Runtime) -> None:
    chat = runtime.session(system="Be brief.")
    first = chat.send("Tom has 3 apples.", adapters="sums", max_new_tokens=40)
    assert first.timings.reused == 0
    second = chat.send("And then?", adapters="sums", max_new_tokens=40)
    assert second.timings.reused >= first.usage.prompt_tokens
    assert second.text == cold(runtime, chat, adapters="sums", max_new_tokens=40)
    assert [message["role"] for message in chat.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_a_cache_of_another_fusion_is_never_used(runtime: Runtime) -> None:
    chat = runtime.session()
    chat.send("Tom has 3 apples.", adapters="sums", max_new_tokens=30)
    for fusion in ("sql", {"sql": 0.5}, {}, {"sums": 0.99}):
        reply = chat.send("And then?", adapters=fusion, max_new_tokens=20)
        assert reply.timings.reused == 0
        assert reply.text == cold(runtime, chat, adapters=fusion, max_new_tokens=20)


def test_what_was_written_under_several_fusions_is_kept_as_far_as_the_first(
    runtime: Runtime,
) -> None:
    chat = runtime.session()
    chat.send("Tom has 3 apples.", adapters="sums", max_new_tokens=30)
    engine = engine_of(runtime, chat)
    before = int(engine.decoder.lengths[0])
    engine.decoder.labels[0] = frozenset({("email", 1.0)})
    engine.decoder.prefill([5, 6, 7])
    engine.decoder.labels[0] = frozenset({("sums", 1.0)})
    ids = [token for token, _ in engine.decoder._written[0]]
    assert engine.decoder.reuse([*ids, 9]) == before
    assert engine.decoder.lengths[0] == before


def test_regenerate_edit_and_branch(runtime: Runtime) -> None:
    options = {"adapters": "sums", "max_new_tokens": 25}
    chat = runtime.session()
    chat.send("One.", **options)  # type: ignore[arg-type]
    second = chat.send("Two.", **options)  # type: ignore[arg-type]
    again = chat.regenerate(**options).finish()  # type: ignore[arg-type]
    assert again.text == second.text
    assert again.timings.reused == second.usage.prompt_tokens - 1
    assert len(chat.messages) == 4

    twin = chat.branch()
    other = twin.send("Three, here.", **options)  # type: ignore[arg-type]
    assert other.timings.reused > second.usage.prompt_tokens
    assert other.text == cold(runtime, twin, **options)
    assert len(chat.messages) == 4

    edited = chat.edit(0, "One, but different.", **options).finish()  # type: ignore[arg-type]
    assert [message["content"] for message in chat.messages] == [
        "One, but different.",
        edited.text,
    ]
    assert edited.text == cold(runtime, chat, **options)
    with pytest.raises(UsageError, match="no turn 7"):
        chat.edit(7, "x")
    with pytest.raises(UsageError, match="empty"):
        runtime.session().regenerate()


def test_a_turn_that_fails_or_never_began_changes_nothing(runtime: Runtime) -> None:
    chat = runtime.session()
    chat.send("One.", adapters={}, max_new_tokens=5)
    before = chat.messages
    with pytest.raises(UsageError):
        chat.send("", adapters={})
    with pytest.raises(UsageError):
        chat.send("Two.", adapters="nobody")
    with pytest.raises(ContextLengthError):
        chat.send("x" * 600, adapters={})
    chat.stream("Two.", adapters={}).close()
    assert chat.messages == before


def test_a_cancelled_turn_keeps_the_text_that_it_had(runtime: Runtime) -> None:
    chat = runtime.session()
    stream = chat.stream("Tell me all.", adapters={}, max_new_tokens=100)
    text = "".join(next(stream).text for _ in range(5))
    with pytest.raises(BusyError):
        chat.send("Hello?")
    stream.close()
    assert chat.messages[-1]["content"].startswith(text)
    assert chat.send("Go on.", adapters={}, max_new_tokens=5).text == cold(
        runtime, chat, adapters={}, max_new_tokens=5
    )


def test_an_abandoned_turn_frees_the_runtime(runtime: Runtime) -> None:
    chat = runtime.session()
    stream = chat.stream("Tell me all.", adapters={}, max_new_tokens=100)
    next(stream)
    del stream
    gc.collect()
    assert chat.send("Go on.", adapters={}, max_new_tokens=5, wait=False).text


def test_dropping_the_oldest_turns(runtime: Runtime) -> None:
    chat = runtime.session(system="Stay.", overflow="drop_oldest")
    for i in range(12):
        chat.send(f"Turn {i}: " + "word " * 10, adapters={}, max_new_tokens=40)
    assert chat.dropped > 0
    assert chat.dropped % 2 == 0
    assert len(chat.messages) + chat.dropped == 1 + 2 * 12
    assert chat.messages[0] == {"role": "system", "content": "Stay."}
    assert chat.messages[1]["role"] == "user"
    with pytest.raises(ContextLengthError):
        chat.send("x" * 600, adapters={})  # does not fit even alone
    strict = runtime.session(messages=chat.messages)
    with pytest.raises(ContextLengthError):
        strict.send("word " * 60, adapters={})
    with pytest.raises(UsageError, match="overflow"):
        runtime.session(overflow="forget")  # type: ignore[arg-type]


def test_drops_leave_room_to_grow(runtime: Runtime) -> None:
    """A drop makes the cache useless, so it must not come at every turn."""
    chat = runtime.session(overflow="drop_oldest")
    reused = [
        chat.send(f"{i}: word word", adapters={}, max_new_tokens=10).timings.reused
        for i in range(30)
    ]
    assert chat.dropped > 0
    assert sum(count > 50 for count in reused) > len(reused) / 2


def test_a_long_answer_is_no_reason_to_forget_a_short_history(runtime: Runtime) -> None:
    said = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    chat = runtime.session(messages=said, overflow="drop_oldest")
    chat.send("Three.", adapters={}, max_new_tokens=512)
    assert chat.dropped == 0


def test_turns_of_several_threads_on_one_session_are_refused_or_kept(runtime: Runtime) -> None:
    chat = runtime.session()
    answered: list[str] = []

    def talk(word: str) -> None:
        for _ in range(5):
            try:
                chat.send(word, adapters={}, max_new_tokens=3)
                answered.append(word)
            except BusyError:
                pass

    threads = [threading.Thread(target=talk, args=(word,)) for word in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [message["content"] for message in chat.messages if message["role"] == "user"]
    assert sorted(said) == sorted(answered)


def test_saving_and_loading(runtime: Runtime, tmp_path: Path) -> None:
    chat = runtime.session(system="Größe", overflow="drop_oldest")
    chat.send("One.", adapters={}, max_new_tokens=10)
    chat.save(tmp_path / "chat.json")
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    again = runtime.load_session(tmp_path / "chat.json")
    assert (again.messages, again.overflow, again.dropped) == (chat.messages, chat.overflow, 0)
    assert (
        again.send("Two.", adapters={}, max_new_tokens=10).text
        == chat.send("Two.", adapters={}, max_new_tokens=10).text
    )
    good = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    for damage in (
        "nonsense",
        "[1]",
        json.dumps({**good, "format": "x"}),
        json.dumps({**good, "version": 99}),
        json.dumps({**good, "messages": [{"role": "user"}]}),
        json.dumps({**good, "messages": None}),
        json.dumps({**good, "overflow": "x"}),
        json.dumps({**good, "dropped": "x"}),
    ):
        (tmp_path / "bad.json").write_text(damage)
        with pytest.raises(UsageError):
            runtime.load_session(tmp_path / "bad.json")
    with pytest.raises(UsageError):
        runtime.load_session(tmp_path / "missing.json")


def test_a_saved_cache_is_not_read_again(runtime: Runtime, tmp_path: Path) -> None:
    options: Any = {"adapters": "sums", "max_new_tokens": 10}
    chat = runtime.session()
    chat.send("Tom has 3 apples and buys 4. How many?", **options)
    file = tmp_path / "chat.json"
    chat.save(file, cache=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.json", "chat.json.kv"]
    again = runtime.load_session(file).send("And then?", **options)
    expected = chat.send("And then?", **options)
    assert (again.text, again.usage) == (expected.text, expected.usage)
    assert again.usage.cached_tokens > 10
    other = runtime.load_session(file).send("And then?", adapters="sql", max_new_tokens=10)
    assert other.usage.cached_tokens == 0
    chat.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


def test_a_saved_cache_that_does_not_fit_is_left_out(
    runtime: Runtime, tiny_bundle: Path, tmp_path: Path
) -> None:
    options: Any = {"adapters": "sums", "max_new_tokens": 10}
    chat = runtime.session()
    chat.send("Tom has 3 apples and buys 4. How many?", **options)
    file, cache = tmp_path / "chat.json", tmp_path / "chat.json.kv"
    chat.save(file, cache=True)
    expected = chat.send("And then?", **options).text
    good = cache.read_bytes()
    middle = len(good) // 2
    for bad in (
        b"",
        good[:-1],
        good + b"x",
        good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        b"\xff" * 8 + good[8:],
        good.replace(b"tokens", b"tokenz"),
        good.replace(b"dlp-edge-cache", b"dlp-edge-cachf"),
    ):
        cache.write_bytes(bad)
        reply = runtime.load_session(file).send("And then?", **options)
        assert reply.text == expected
        assert reply.usage.cached_tokens == 0 or b"cachf" in bad
    cache.write_bytes(good)
    with Runtime(tiny_bundle, max_context=20) as small:
        small.load_session(file)  # longer than its context
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    with Runtime(copy) as changed:
        changed.remove_adapter("sql")
        reply = changed.load_session(file).send("And then?", **options)
        assert reply.usage.cached_tokens == 0


def test_caches_stay_within_their_budget(tiny_bundle: Path) -> None:
    with Runtime(tiny_bundle) as runtime:
        one = runtime._open().engine.decoder.cache_bytes
    with Runtime(tiny_bundle, cache_budget=2 * one) as runtime:
        chats = [runtime.session() for _ in range(3)]
        for chat in chats:
            chat.send("One.", adapters={}, max_new_tokens=5)
        reused = [
            chat.send("Two.", adapters={}, max_new_tokens=5).timings.reused
            for chat in (chats[2], chats[1], chats[0])
        ]
        assert reused[0] > 0
        assert reused[1] > 0
        assert reused[2] == 0  # it spoke longest ago
        del chats, chat
        gc.collect()
        assert len(runtime._open().caches._engines) == 0


def test_sessions_of_several_threads(runtime: Runtime) -> None:
    """Their turns interleave, their caches do not."""
    words = ["apples", "rows", "letters", "days"]
    texts: dict[str, list[str]] = {}

    def talk(word: str) -> None:
        chat = runtime.session()
        texts[word] = [
            chat.send(f"Say {word}.", adapters="sums", max_new_tokens=15).text for _ in range(4)
        ]

    threads = [threading.Thread(target=talk, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for word in words:
        assert texts.pop(word) == (talk(word) or texts[word])


def test_not_waiting(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle, max_parallel=1)
    stream = runtime.stream("Hello", adapters={}, max_new_tokens=50)
    next(stream)
    raised: list[BaseException] = []

    def impatient() -> None:
        try:
            runtime.generate("Hello", adapters={}, wait=False)
        except BusyError as error:
            raised.append(error)

    thread = threading.Thread(target=impatient)
    thread.start()
    thread.join()
    stream.close()
    assert len(raised) == 1
    assert runtime.generate("Hello", adapters={}, max_new_tokens=2, wait=False).text
    runtime.close()


def test_a_closed_runtime_closes_its_sessions(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle)
    chat = runtime.session()
    chat.send("One.", adapters={}, max_new_tokens=5)
    runtime.close()
    with pytest.raises(UsageError, match="closed"):
        chat.send("Two.")


def test_async_streams(runtime: Runtime) -> None:
    async def collect(prompt: str, count: int = 1000) -> list[Chunk]:
        chunks: list[Chunk] = []
        stream = runtime.astream(prompt, adapters={}, max_new_tokens=30)
        async for chunk in stream:
            chunks.append(chunk)
            if len(chunks) == count:
                break
        await stream.aclose()
        return chunks

    async def main() -> None:
        alone = [runtime.generate(p, adapters={}, max_new_tokens=30).text for p in ("a", "b", "c")]
        together = await asyncio.gather(*(collect(prompt) for prompt in ("a", "b", "c")))
        assert ["".join(chunk.text for chunk in chunks) for chunks in together] == alone
        assert len(await collect("a", 3)) == 3
        slow = asyncio.create_task(collect("a"))
        await asyncio.sleep(0)  # it begins, and cannot have ended
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        with pytest.raises(UsageError):
            runtime.astream("", adapters={})
        assert await collect("b")  # the turn is free again

    asyncio.run(asyncio.wait_for(main(), 60))


def test_collecting_an_async_stream_waits_for_no_lock(tiny_bundle: Path) -> None:
    """The collector may run in the middle of any executor's `submit`."""
    code = (
        "import asyncio, gc\n"
        "from concurrent.futures.thread import _global_shutdown_lock\n"
        "from dlp_edge import Runtime\n"
        "async def main(runtime):\n"
        "    stream = runtime.astream('Hello', adapters={}, max_new_tokens=100)\n"
        "    await stream.__anext__()\n"
        "    stream.cycle = stream\n"
        "    del stream\n"
        "    with _global_shutdown_lock:\n"
        "        gc.collect()\n"
        "    print(runtime.generate('Hello', adapters={}, max_new_tokens=5).finish_reason)\n"
        f"with Runtime({str(tiny_bundle)!r}) as runtime: asyncio.run(main(runtime))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "length\n", done.stderr


def test_an_ended_async_stream_stays_ended_and_frees_the_runtime(runtime: Runtime) -> None:
    async def main() -> None:
        async with runtime.astream("a", adapters={}, max_new_tokens=30) as stream:
            assert (await stream.__anext__()).text
        assert [chunk async for chunk in stream] == []
        assert runtime.generate("b", adapters={}, max_new_tokens=3, wait=False).text
        chat = runtime.session()
        async for _ in chat.astream("c", adapters={}, max_new_tokens=3):
            pass
        assert len(chat.messages) == 2

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_runtime_stays_in_its_process(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="another process"):
        pickle.dumps(runtime)
    if hasattr(os, "fork"):
        assert multiprocessing.get_context("fork").Pool(1).apply(refused_after_a_fork) == "forked"


def refused_after_a_fork() -> str:
    [runtime] = [o for o in gc.get_objects() if isinstance(o, Runtime) and o._loaded is not None]
    try:
        runtime.generate("Hello")
    except UsageError as error:
        runtime.close()  # waits for nobody
        return "forked" if "forked" in error.cause else error.cause
    return "answered"


def test_reused_logits_are_those_of_a_cold_pass(runtime: Runtime) -> None:
    chat = runtime.session()
    chat.send("Tom has 3 apples.", adapters="sql", max_new_tokens=30)
    decoder = engine_of(runtime, chat).decoder
    ids = [token for token, _ in decoder._written[0]] + [3, 4]
    known = decoder.reuse(ids[:-1])
    assert known > 30
    warm = decoder.prefill(ids[known:]).copy()
    decoder.truncate(0)
    assert np.abs(decoder.prefill(ids) - warm).max() <= 1e-4
