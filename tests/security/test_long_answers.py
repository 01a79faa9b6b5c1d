"""Answers of ten thousand sentences cost what their sentences cost, and no more; a history of them
is loaded, cut and saved at once."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.runtime.request import Decoding
from dlp_edge.runtime.routing.policy import Routed, load_router
from dlp_edge.runtime.runtime import Runtime
from tests.testing.paths import TINY
from tests.unit.test_generation import Generation

pytestmark = pytest.mark.slow

SENTENCES = 10_000
MAX_SECONDS = 20  # of the processor; 4 where no token looks at all sentences, else 50
MAX_BYTES = 20_000  # a sentence, with its seven tokens


def test_routing_and_listing_the_sentences_of_an_answer() -> None:
    router = load_router(open_bundle(TINY / "bundle"))
    assert router is not None
    decoding = replace(Decoding(), max_new_tokens=100 * SENTENCES)
    text = "".join(f"Ab {number} cd. " for number in range(SENTENCES))  # no loop, which would end
    policy = Routed(router, SelectionRule())
    generation = Generation(text, policy, decoding, room=100 * SENTENCES)
    process = psutil.Process()
    memory, begun = process.memory_info().rss, time.process_time()
    for _ in generation.run():
        pass
    assert len(generation.reply().sentences) == SENTENCES
    assert time.process_time() - begun < MAX_SECONDS
    assert process.memory_info().rss - memory < SENTENCES * MAX_BYTES


def test_a_history_of_long_answers(tmp_path: Path) -> None:
    """Answers that a session cannot hold are dropped or refused at once, and saved in full."""
    long = "Ab cd. " * SENTENCES
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": long}] * 4
    saved = {
        "format": "dlp-edge-session", "version": 1, "overflow": "drop_oldest", "dropped": 0,
        "messages": messages,
    }  # fmt: skip
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(saved), encoding="utf-8")
    process = psutil.Process()
    with Runtime(TINY / "bundle", threads=1) as runtime:
        runtime.generate("Hello", max_new_tokens=2)
        memory, begun = process.memory_info().rss, time.process_time()
        session = runtime.load_session(path)
        stream = session.stream("Count 3", max_new_tokens=4)
        assert list(stream)
        session.save(path)
        assert time.process_time() - begun < 5
        assert process.memory_info().rss - memory < 200 << 20
    assert len(json.loads(path.read_text())["messages"]) <= len(messages) + 2
