"""Names of fusions: the front's and the plugin's are the same, one for each."""

from __future__ import annotations

import pytest
from dlp_edge_vllm.names import GRID, format_name, parse
from hypothesis import given
from hypothesis import strategies as st

from dlp_edge import UsageError
from dlp_edge.front.fusion_name import BASE, name_of, on_grid

SKILLS = ("sums", "sql", "email", "a.b-c_d", "Ünicode"[1:])
weights = st.dictionaries(st.sampled_from(SKILLS), st.floats(0.001, 1), max_size=5)


@given(weights, st.integers(1, 5))
def test_every_routed_fusion_has_a_name_that_the_plugin_reads(
    routed: dict[str, float], most: int
) -> None:
    total = sum(routed.values())
    shares = {name: weight / total for name, weight in routed.items()}
    rounded = on_grid(shares, most)
    assert sum(rounded.values()) == pytest.approx(1 if routed else 0)
    assert len(rounded) <= most
    kept = sorted(shares, key=lambda name: (-shares[name], name))[:most]
    scale = sum(shares[name] for name in kept)
    for name in kept:
        assert rounded.get(name, 0.0) == pytest.approx(shares[name] / scale, abs=1 / GRID + 1e-9)
    name = name_of(rounded)
    if not rounded:
        assert name == BASE
    else:
        read = parse(name, SKILLS)
        assert read == {skill: round(weight * GRID) for skill, weight in rounded.items()}
        assert format_name(read) == name
    assert on_grid(rounded, most) == pytest.approx(rounded)


@pytest.mark.parametrize(
    ("given_weights", "name"),
    [
        ({}, "base"),
        ({"sql": 1.0}, "sql"),
        ({"sql": 0.613, "email": 0.387}, "sql@0.60+email@0.40"),
        ({"sql": 0.5, "email": 0.5}, "email@0.50+sql@0.50"),
        ({"sql": 0.99, "email": 0.01}, "sql"),
        ({"sql": 0.3}, "sql@0.30"),
        ({"sql": 1.0, "email": 1.0}, "email@1.00+sql@1.00"),
        ({"sql": 0.4, "email": 0.3, "sums": 0.3}, "sql@0.40+email@0.30+sums@0.30"),
    ],
)
def test_names(given_weights: dict[str, float], name: str) -> None:
    assert name_of(on_grid(given_weights, 4)) == name


def test_weights_have_bounds() -> None:
    for wrong in (-0.1, 2.1, float("nan")):
        with pytest.raises(UsageError):
            on_grid({"sql": wrong}, 4)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nobody",
        "sql@0.60",  # in canon, but see below
        "sql@1.00",
        "sql@0.6+email@0.4",
        "email@0.40+sql@0.60",
        "sql@0.50+email@0.50",
        "sql@0.60+sql@0.40",
        "sql@0.61+email@0.39",
        "sql@0.00+email@1.00",
        "sql@2.05",
        "sql@0.60+email@0.40 ",
        "sql@0.60+nobody@0.40",
        "sql@0.60+email@0.40/../..",
        "../sql",
        "/etc/passwd",
        "sql\n",
        "sql@٠.60",
        "+".join(["sql@0.05"] * 100),
    ],
)
def test_a_fusion_has_one_spelling(name: str) -> None:
    expected = {"sql": 12} if name == "sql@0.60" else None
    assert parse(name, SKILLS) == expected
