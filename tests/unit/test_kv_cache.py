"""Zeros that take memory only where they are written."""

from __future__ import annotations

import gc
import sys

import numpy as np
import psutil
import pytest

from dlp_edge.runtime.engine.kv_cache import lazy_zeros


def test_they_are_zeros_that_can_be_written() -> None:
    found = lazy_zeros((3, 5, 7), np.float16)
    assert found.shape == (3, 5, 7)
    assert found.dtype == np.float16
    assert not found.any()
    found[1, 2] = 4
    assert found.sum() == 28
    assert lazy_zeros((0, 4), np.float32).shape == (0, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="asks for small pages on Linux")
def test_little_written_in_many_places_takes_little() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    found = lazy_zeros((64, 1 << 20), np.float32)  # 256 MB
    found[:, :100] = 1
    assert process.memory_info().rss - before < 8 << 20
    found[:] = 1
    assert process.memory_info().rss - before > 200 << 20
    del found
    gc.collect()
    assert process.memory_info().rss - before < 8 << 20
