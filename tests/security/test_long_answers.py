"""A history of answers of ten thousand sentences is loaded, cut and saved at once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from dlp_edge.runtime.runtime import Runtime
from tests.testing.paths import TINY

pytestmark = pytest.mark.slow

SENTENCES = 10_000


def test_a_history_of_long_answers(tmp_path: Path) -> None:
    """Answers that a session cannot hold are dropped or refused at once, and saved in full."""
    long = "Ab cd. " * SENTENCES
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": long}] * 4
    saved = {
        "format": "dlp-edge-session", "version": 1, "overflow": "drop_oldest", "dropped": 0,
        "messages": messages,
    }  # fmt: skip
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(saved))
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
