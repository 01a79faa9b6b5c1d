"""Benchmarks whose subject is a reference implementation: it must compute what it claims to."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlp_edge.bundle import open_bundle

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gather", "dense"])
def test_token_gating_with_gates_of_zero_is_a_fusion_of_two(tiny_bundle: Path, way: str) -> None:
    from benchmarks.token_gating import difference

    assert difference(open_bundle(tiny_bundle), way, list(range(20, 60))) < 1e-3
