"""The soak test's own code, for seconds instead of hours (benchmarks/soak.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import soak


@pytest.mark.slow
def test_every_kind_of_request_is_made(
    tiny_bundle: Path, tiny_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "CHANGE_EVERY", 10)
    found = soak.soak(tiny_bundle, ("sql", tiny_adapters["sql"]), 120, 120, threads=1, tokens=12)
    assert found.sentences >= 120
    assert found.kinds["change"] >= 2
    assert {"stream", "cancelled", "batch", "conversation", "as_json"} <= set(found.kinds)
    assert len(found.points) == sum(found.kinds.values()) - found.kinds["change"]
    rows = soak.tenths(found.points)
    assert len(rows) == 10
    assert rows[-1]["sentences"] == found.sentences


def test_the_drift_of_the_last_half() -> None:
    flat = [(float(i), i, 500 if i > 50 else 9) for i in range(100)]
    assert soak.drift(flat[51:]) == pytest.approx(0)
    rising = [(float(i), i, 1000 + i) for i in range(200)]
    assert soak.drift(rising) == pytest.approx(100 * 99 / 1149.5)
