"""Reading the backbone's weights while a second thread hashes them."""

from __future__ import annotations

import hashlib
import io
import threading
import time

import pytest

from dlp_edge.bundle import weight_file
from dlp_edge.bundle.weight_file import WAITING, read_weights
from dlp_edge.errors import ResourceError
from dlp_edge.runtime.runtime import Runtime
from dlp_edge.untrusted.regular_file import no_progress
from tests.testing.paths import KEPT


def test_a_file_of_gaps_does_not_wait_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow hashing is."""
    data, sha256 = bytes(range(200)), hashlib.sha256
    hashed = 0
    waiting = []

    class SlowHash:
        def __init__(self) -> None:
            self._digest = sha256()

        def update(self, block: bytes) -> None:
            nonlocal hashed
            time.sleep(0.001)
            self._digest.update(block)
            hashed += len(block)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    class File(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            waiting.append(self.tell() - hashed)
            return super().read(size)

    monkeypatch.setattr(weight_file.hashlib, "sha256", SlowHash)  # type: ignore[attr-defined]
    monkeypatch.setattr(weight_file, "BLOCK", 1)
    _, size, digest = read_weights(File(data), len(data), (), no_progress)
    monkeypatch.undo()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    assert max(waiting) <= WAITING + 1  # those, and the one that is being hashed


def test_no_memory_for_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ResourceError, match="not enough memory to load"):
        Runtime(KEPT, threads=1)
