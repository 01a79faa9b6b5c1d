"""`dlp-edge bench`: what it measures and what it demands; never how fast it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlp_edge.bench.measure import measure, ratio
from dlp_edge.cli.main import main
from dlp_edge.errors import UsageError

SMALL = ["--prompt-tokens", "20", "--new-tokens", "32", "--rounds", "2"]


@pytest.fixture(scope="module")
def document(either_bundle: Path) -> dict[str, Any]:
    return measure(either_bundle, prompt_tokens=20, new_tokens=32, rounds=3)


def test_each_case_has_its_figures(document: dict[str, Any], operators: bool) -> None:
    assert ("plain onnxruntime operators" not in document["device"]) == operators
    assert list(document["cases"]) == ["base", "one", "two", "dlp"]  # three adapters, no four
    for name, case in document["cases"].items():
        assert len(case["rounds_ms_per_token"]) == 3
        assert case["step_ms"]["p50"] <= case["step_ms"]["p99"]
        assert (case["router_ms"] is not None) == (name == "dlp")
        assert case["share_of_copy_bandwidth"] > 0
    assert set(document["ratios"]) == {"one/base", "two/base", "dlp/base"}
    assert document["peak_bytes"] > 1e7
    assert document["load_seconds"] > 0


def test_ratios_are_taken_within_rounds() -> None:
    assert ratio([2, 30, 2], [1, 10, 2]) == {"median": 2, "least": 1, "most": 3}


def test_random_adapters_stand_in_for_many(tiny_bundle: Path) -> None:
    found = measure(tiny_bundle, prompt_tokens=20, new_tokens=32, rounds=1, synthetic=[2, 30])
    assert list(found["cases"]) == ["2 adapters", "30 adapters"]
    assert list(found["ratios"]) == ["30 adapters/2 adapters"]


def test_another_router_is_a_case_of_its_own(tiny_bundle: Path) -> None:
    found = measure(
        tiny_bundle,
        prompt_tokens=20,
        new_tokens=32,
        rounds=1,
        other_routers={"again": tiny_bundle},
    )
    assert found["cases"]["dlp again"]["router_ms"]["p50"] > 0


@pytest.mark.parametrize(
    ("limit", "code"), [("dlp/base<=1000", 0), ("dlp/base<=0.001", 1), ("dlp/base>=0.001", 0)]
)
def test_a_missed_limit_is_exit_code_1(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], limit: str, code: int
) -> None:
    assert main(["bench", str(tiny_bundle), *SMALL, "--assert", limit, "--json"]) == code
    found = json.loads(capsys.readouterr().out)["limits"][0]
    assert found["kept"] == (code == 0)
    assert found["limit"] == limit


def test_table_and_plot(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "bench.png"
    assert main(["bench", str(tiny_bundle), *SMALL, "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "dlp" in out
    assert "peak memory" in out
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--assert", "dlp is fast"],
        ["--assert", "dlp/nothing<=1"],
        ["--router", "albert"],
        ["--prompt-tokens", "100000"],
        ["--rounds", "0"],
        ["--synthetic", "1"],
        ["--plot", "/nowhere/at/all.png"],
    ],
)
def test_bad_requests_are_usage_errors(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(["bench", str(tiny_bundle), *SMALL, *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_too_long_for_the_context(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="context"):
        measure(tiny_bundle, prompt_tokens=500, new_tokens=100)
