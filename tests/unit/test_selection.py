"""Selection and weighing against plain references written from eq. 4 and 5 of the paper."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.errors import UsageError
from dlp_edge.runtime.routing.selection import select, weigh
from dlp_edge.types import SelectRule

Distribution = dict[str, float]


def named(raw: list[float]) -> Distribution:
    return {f"a{i}": value / sum(raw) for i, value in enumerate(raw)}


# Small whole numbers give ties, zeros and sums that p can hit exactly; 1 to 128 classes.
distributions = st.one_of(
    st.lists(st.integers(0, 4).map(float), min_size=1, max_size=128),
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
    st.integers(1, 128).map(lambda count: [1.0] * count),
).filter(lambda raw: sum(raw) > 1e-6).map(named)  # fmt: skip


@st.composite
def questions(draw: st.DrawFn) -> tuple[Distribution, float]:
    """Probabilities and a p: any, one of them, or just a sum of the largest."""
    y = draw(distributions)
    largest = sorted(y.values(), reverse=True)
    count = draw(st.integers(1, len(y)))
    exact = st.sampled_from([largest[count - 1], math.fsum(largest[:count])])
    p = draw(exact | st.floats(0.01, 1.0) | st.sampled_from([0.5, 0.6, 1.0]))
    return y, p if 0 < p <= 1 else 1.0


def descending(y: Distribution) -> list[str]:
    """Names by falling probability, equal ones in the order of the classes."""
    names = list(y)
    return sorted(names, key=lambda name: (-y[name], names.index(name)))


def reaches(y: Distribution, names: list[str], p: float) -> bool:
    """Is the exact sum, rounded once, at least p?"""
    return float(sum(Fraction(y[name]) for name in names)) >= p


@given(questions())
@example(({f"a{i}": 0.1 for i in range(10)}, 0.8))
@example(({"a": 0.9999999999999999, "b": 0.0}, 1.0))
def test_nucleus_is_the_smallest_set_that_reaches_p(question: tuple[Distribution, float]) -> None:
    y, p = question
    order = [name for name in descending(y) if y[name] > 0]
    sizes = [n for n in range(1, len(order) + 1) if reaches(y, order[:n], p)]
    expected = order[: min(sizes, default=len(order))]
    assert select(y, SelectionRule("nucleus", p=p)) == tuple(expected)


@given(questions())
def test_threshold_is_eq_4_as_printed(question: tuple[Distribution, float]) -> None:
    """All with y_r >= p; the largest if there is none."""
    y, p = question
    order = descending(y)
    expected = [name for name in order if y[name] >= p] or order[:1]
    assert select(y, SelectionRule("threshold", p=p)) == tuple(expected)


@given(distributions, st.integers(1, 130))
def test_top_k_keeps_the_k_largest(y: Distribution, k: int) -> None:
    assert select(y, SelectionRule("top_k", k=k)) == tuple(descending(y)[:k])


@given(questions(), st.sampled_from(["nucleus", "threshold", "top_k"]), st.integers(1, 5))
def test_weights_are_eq_5(question: tuple[Distribution, float], by: SelectRule, k: int) -> None:
    """softmax over the selected probabilities; renormalise: their shares of the sum."""
    y, p = question
    chosen = select(y, SelectionRule(by, p=p, k=k))
    exponentials = {name: math.exp(y[name]) for name in chosen}
    total, mass = math.fsum(exponentials.values()), math.fsum(y[name] for name in chosen)
    soft, plain = weigh(y, chosen, "softmax"), weigh(y, chosen, "renormalise")
    assert list(soft) == list(plain) == list(chosen)
    for name in chosen:
        assert soft[name] == pytest.approx(exponentials[name] / total, rel=1e-12)
        assert plain[name] == pytest.approx(y[name] / mass, rel=1e-12)
    for weights in (soft, plain):
        assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
        assert all(weight >= 0 for weight in weights.values())


@given(questions(), st.sampled_from(["nucleus", "threshold", "top_k"]), st.integers(1, 5))
def test_never_more_than_needed_never_none(
    question: tuple[Distribution, float], by: SelectRule, k: int
) -> None:
    """What is left out is never more probable than what is kept."""
    y, p = question
    chosen = select(y, SelectionRule(by, p=p, k=k))
    left_out = [y[name] for name in y if name not in chosen]
    assert chosen
    assert max(left_out, default=0.0) <= min(y[name] for name in chosen)


@given(distributions, st.floats(0, 1))
def test_abstains_below_min_confidence_only(y: Distribution, least: float) -> None:
    chosen = select(y, SelectionRule(min_confidence=least))
    assert (chosen == ()) == (max(y.values()) < least)


def test_the_papers_example() -> None:
    """Two adapters at 0.51 and 0.49 are fused 50.5 % to 49.5 % (figure 3 of the paper)."""
    y = {"a": 0.51, "b": 0.49}
    weights = weigh(y, select(y, SelectionRule()), "softmax")
    assert weights == pytest.approx({"a": 0.505, "b": 0.495}, abs=5e-4)


def test_without_adapters_nothing_is_selected() -> None:
    assert select({}, SelectionRule()) == ()
    assert weigh({"a": 1.0}, (), "softmax") == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"select": "best"},
        {"weigh": "even"},
        {"p": 0.0},
        {"p": 1.5},
        {"p": math.nan},
        {"p": "0.5"},
        {"k": 0},
        {"k": 1.5},
        {"k": True},
        {"min_confidence": -0.1},
        {"min_confidence": math.inf},
    ],
)
def test_wrong_rules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SelectionRule(**wrong)  # type: ignore[arg-type]
