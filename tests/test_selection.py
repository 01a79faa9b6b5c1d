"""Selection and weighing against plain references (eq. 4 and 5)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlp_edge.errors import UsageError
from dlp_edge.runtime.selection import SelectionRule, select, weigh

distributions = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=20).map(
    lambda raw: {f"a{i}": value / sum(raw) for i, value in enumerate(raw)}
)


def descending(y: dict[str, float]) -> list[str]:
    return [name for _, name in sorted(((-value, name) for name, value in y.items()))]


@given(distributions, st.floats(0.01, 1.0))
def test_nucleus_is_the_smallest_prefix_that_reaches_p(y: dict[str, float], p: float) -> None:
    chosen = select(y, SelectionRule("nucleus", p=p))
    values = sorted(y.values(), reverse=True)
    assert [y[name] for name in chosen] == values[: len(chosen)]
    assert sum(values[: len(chosen) - 1]) < p or len(chosen) == 1
    assert sum(values[: len(chosen)]) >= p - 1e-9 or len(chosen) == len(y)


@given(distributions, st.floats(0.01, 1.0))
def test_threshold_keeps_all_at_or_above_p_or_the_largest(y: dict[str, float], p: float) -> None:
    chosen = set(select(y, SelectionRule("threshold", p=p)))
    above = {name for name, value in y.items() if value >= p}
    if above:
        assert chosen == above
    else:
        assert len(chosen) == 1
        assert y[chosen.pop()] == max(y.values())


@given(distributions, st.integers(1, 30))
def test_top_k_keeps_the_k_largest(y: dict[str, float], k: int) -> None:
    chosen = select(y, SelectionRule("top_k", k=k))
    assert [y[name] for name in chosen] == sorted(y.values(), reverse=True)[:k]


@given(distributions, st.integers(1, 5))
def test_weights_match_their_formulas_and_sum_to_one(y: dict[str, float], k: int) -> None:
    chosen = select(y, SelectionRule("top_k", k=k))
    soft, plain = weigh(y, chosen, "softmax"), weigh(y, chosen, "renormalise")
    total = sum(math.exp(y[name]) for name in chosen)
    for name in chosen:
        assert soft[name] == pytest.approx(math.exp(y[name]) / total)
        assert plain[name] == pytest.approx(y[name] / sum(y[n] for n in chosen))
    assert sum(soft.values()) == pytest.approx(1)
    assert sum(plain.values()) == pytest.approx(1)


def test_the_papers_example() -> None:
    """Two adapters at 0.51 and 0.49 are fused 50.5 % to 49.5 % (figure 3 of the paper)."""
    y = {"a": 0.51, "b": 0.49}
    weights = weigh(y, select(y, SelectionRule()), "softmax")
    assert weights == pytest.approx({"a": 0.505, "b": 0.495}, abs=5e-4)


def test_abstains_below_min_confidence() -> None:
    y = {"a": 0.6, "b": 0.4}
    assert select(y, SelectionRule(min_confidence=0.7)) == ()
    assert weigh(y, (), "softmax") == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"select": "best"},
        {"weigh": "even"},
        {"p": 0.0},
        {"p": 1.5},
        {"k": 0},
        {"min_confidence": -0.1},
    ],
)
def test_wrong_rules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SelectionRule(**wrong)  # type: ignore[arg-type]
