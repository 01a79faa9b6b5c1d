"""Prefixes that requests share: reused under the same fusion, and under no other."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Message, Runtime, UsageError
from dlp_edge.runtime.engine.prefix_cache import BLOCK, PrefixCache
from tests.testing.engines import make_engine_for

SYSTEM: Message = {"role": "system", "content": "You help with sums, tables and letters. " * 4}


def asked(text: str) -> list[Message]:
    return [SYSTEM, {"role": "user", "content": text}]


OPTIONS: dict[str, Any] = {"adapters": "sums", "max_new_tokens": 20, "repetition_stop": False}


@pytest.fixture(scope="module")
def plain(either_bundle: Path) -> Iterator[Runtime]:
    with Runtime(either_bundle, threads=1) as runtime:
        yield runtime


@pytest.fixture
def runtime(either_bundle: Path) -> Iterator[Runtime]:
    with Runtime(either_bundle, threads=1, prefix_cache=64 << 20) as runtime:
        yield runtime


def test_a_system_prompt_is_read_once(runtime: Runtime, plain: Runtime) -> None:
    first = runtime.generate(asked("Hello"), **OPTIONS)
    runtime.generate("Something else", **OPTIONS)  # the cache that wrote it is overwritten
    second = runtime.generate(asked("And you?"), **OPTIONS)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens >= 3 * BLOCK
    assert second.usage.cached_tokens < second.usage.prompt_tokens
    assert second.text == plain.generate(asked("And you?"), **OPTIONS).text


def test_another_fusion_reuses_nothing(runtime: Runtime, plain: Runtime) -> None:
    runtime.generate(asked("Hello"), **OPTIONS)
    for adapters in ({}, "sql", {"sums": 0.5}, {"sums": 1.0, "sql": 0.1}):
        options = {**OPTIONS, "adapters": adapters}
        reply = runtime.generate(asked("Hello"), **options)
        assert reply.usage.cached_tokens == 0
        assert reply.text == plain.generate(asked("Hello"), **options).text
    assert runtime.generate(asked("Hello"), **OPTIONS).usage.cached_tokens > 0


def test_a_conversation_that_the_client_keeps(runtime: Runtime, plain: Runtime) -> None:
    said = asked("Hello")
    first = runtime.generate(said, **OPTIONS)
    for words in ("Something else", "Again else"):
        runtime.generate(words, **OPTIONS)
    said += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on"}]
    second = runtime.generate(said, **OPTIONS)
    # Not the answer, where its text has other tokens than those that wrote it.
    assert second.usage.cached_tokens >= first.usage.prompt_tokens // BLOCK * BLOCK - BLOCK
    assert second.text == plain.generate(said, **OPTIONS).text


def test_requests_side_by_side_share_it(runtime: Runtime, plain: Runtime) -> None:
    words = [f"Say {number}" for number in range(8)]
    alone = [plain.generate(asked(word), **OPTIONS).text for word in words]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda word: runtime.generate(asked(word), **OPTIONS), words))
    assert [reply.text for reply in replies] == alone
    assert sum(reply.usage.cached_tokens >= 3 * BLOCK for reply in replies) >= 6


def test_a_session_shares_it_too(runtime: Runtime, plain: Runtime) -> None:
    runtime.generate(asked("Hello"), **OPTIONS)
    session = runtime.session(system=SYSTEM["content"])
    reply = session.send("And you?", **OPTIONS)
    assert reply.usage.cached_tokens >= 3 * BLOCK
    assert reply.text == plain.generate(asked("And you?"), **OPTIONS).text


def test_an_edition_with_other_adapters_starts_anew(bundle_copy: Path) -> None:
    with Runtime(bundle_copy, threads=1, prefix_cache=64 << 20) as runtime:
        runtime.generate(asked("Hello"), **OPTIONS)
        runtime.remove_adapter("sql")
        assert runtime.generate(asked("Hello"), **OPTIONS).usage.cached_tokens == 0


def test_without_it_no_answer_depends_on_what_came_before(plain: Runtime) -> None:
    for _ in range(2):
        assert plain.generate(asked("Hello"), **OPTIONS).usage.cached_tokens == 0


def test_the_oldest_go_within_the_budget(tiny_bundle: Path) -> None:
    engine = make_engine_for(tiny_bundle, 256)
    decoder = engine.decoder
    texts = [list(range(start, start + 2 * BLOCK)) for start in range(0, 6 * BLOCK, 2 * BLOCK)]
    decoder.prefill(texts[0])
    block = decoder.read(0, 0, BLOCK).nbytes
    cache = PrefixCache(4 * block)
    for text in texts[:2]:
        decoder.truncate(0)
        decoder.prefill(text)
        cache.store(decoder, 0)
    assert cache.bytes == 4 * block
    decoder.truncate(0)
    assert cache.restore(decoder, 0, texts[0]) == 2 * BLOCK  # now the second is the oldest
    decoder.truncate(0)
    decoder.prefill(texts[2])
    cache.store(decoder, 0)
    assert cache.bytes == 4 * block
    assert [cache.length(text, None) for text in texts] == [2 * BLOCK, 0, 2 * BLOCK]
    nothing = PrefixCache(block - 1)
    nothing.store(decoder, 0)
    assert nothing.bytes == 0


def test_a_budget_that_is_none(tiny_bundle: Path) -> None:
    wrong: Any = "much"
    with pytest.raises(UsageError, match="prefix_cache"):
        Runtime(tiny_bundle, prefix_cache=wrong)
