"""Sampling against numpy and scipy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax
from scipy.stats import chisquare

from dlp_edge.runtime.decoding.sampling import (
    largest_ids,
    log_probabilities_of,
    make_sampler,
)
from tests.testing.reference_sampling import distribution

Logits = npt.NDArray[np.floating]
# Any, and few different values, so that there are ties.
logit_vectors = st.one_of(
    arrays(np.float32, st.integers(1, 60), elements=st.floats(-20, 20, width=32)),
    arrays(np.float32, st.integers(1, 60), elements=st.integers(-3, 3).map(float)),
    arrays(np.float16, st.integers(1, 60), elements=st.floats(-20, 20, width=16)),
)
SAMPLES = 5_000
temperatures = st.floats(0.05, 5)


def descending(logits: Logits) -> list[int]:
    """Ids by falling logit, equal ones by id."""
    return sorted(range(len(logits)), key=lambda id_: (-logits[id_], id_))


@given(logit_vectors, temperatures, st.integers(0, 70))
@example(np.array([1, 2, 2, 2, 0], np.float32), 1.0, 2)
def test_top_k_keeps_exactly_the_k_largest(logits: Logits, temperature: float, top_k: int) -> None:
    ids, probabilities = distribution(logits, temperature, 1.0, top_k)
    expected = descending(logits)[: top_k or None]
    assert ids.tolist() == expected
    among = softmax(logits[expected].astype(np.float64) / temperature)
    np.testing.assert_allclose(probabilities, among, rtol=1e-9, atol=1e-300)


@given(logit_vectors, temperatures, st.floats(0.01, 1), st.integers(0, 70))
def test_top_p_keeps_the_smallest_set_that_reaches_p(
    logits: Logits, temperature: float, top_p: float, top_k: int
) -> None:
    """Top-p works on what top-k left, and what both leave is renormalised."""
    ids, probabilities = distribution(logits, temperature, top_p, top_k)
    order = descending(logits)[: top_k or None]
    among = softmax(logits[order].astype(np.float64) / temperature)
    kept = len(ids)
    assert ids.tolist() == order[:kept]
    rounding = 1e-12
    assert among[:kept].sum() >= top_p - rounding
    assert kept == 1 or among[: kept - 1].sum() < top_p + rounding
    np.testing.assert_allclose(probabilities, among[:kept] / among[:kept].sum(), rtol=1e-9)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


@given(st.integers(0, 6), st.integers(1, 64))
def test_top_p_at_an_exact_sum(power: int, count: int) -> None:
    """Of 2^power equal tokens, top_p = k / 2^power keeps the first k."""
    size = 2**power
    kept = min(count, size)
    ids, probabilities = distribution(np.zeros(size, np.float32), 1.0, kept / size, 0)
    assert ids.tolist() == list(range(kept))
    np.testing.assert_allclose(probabilities, 1 / kept)


@given(logit_vectors, st.floats(1e-300, 1e-6))
def test_a_temperature_near_zero_takes_one_of_the_largest(
    logits: Logits, temperature: float
) -> None:
    token = make_sampler(temperature, 1.0, 0, seed=0)(logits)
    assert logits[token] >= logits.max() - 1e-3  # exp(-1000) is never drawn


@given(logit_vectors)
def test_greedy_takes_the_lowest_of_the_largest(logits: Logits) -> None:
    assert make_sampler(0.0, 1.0, 0, None)(logits) == descending(logits)[0]


@given(logit_vectors, temperatures, st.floats(0.1, 1), st.integers(0, 9), st.integers(0, 2**63))
@settings(max_examples=50)
def test_a_seed_repeats_its_tokens(
    logits: Logits, temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    first, second = (make_sampler(temperature, top_p, top_k, seed) for _ in range(2))
    allowed, _ = distribution(logits, temperature, top_p, top_k)
    tokens = [first(logits) for _ in range(20)]
    assert tokens == [second(logits) for _ in range(20)]
    assert set(tokens) <= set(allowed.tolist())


def test_another_seed_gives_other_tokens() -> None:
    logits = np.zeros(1000, np.float32)
    first = {make_sampler(1.0, 1.0, 0, seed)(logits) for seed in range(50)}
    assert len(first) > 40
    one, other = (make_sampler(1.0, 1.0, 0, None) for _ in range(2))
    assert [one(logits) for _ in range(8)] != [other(logits) for _ in range(8)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 1.0, 0), (1.0, 1.0, 3), (1.0, 0.8, 0), (1.3, 0.7, 5)],
)
def test_samples_follow_the_distribution(
    temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    """Chi-square of the samples against probabilities computed here, in id order."""
    logits = np.array([1.0, 0.0, -1.0, 2.0, 1.5, 0.5, 1.0, -0.5], np.float32)
    expected = softmax(logits.astype(np.float64) / temperature)
    order = np.lexsort((np.arange(8), -expected))
    expected[order[top_k or 8 :]] = 0
    expected /= expected.sum()
    sums = np.cumsum(expected[order])
    expected[order[1:][sums[:-1] >= top_p]] = 0
    expected /= expected.sum()
    sampler = make_sampler(temperature, top_p, top_k, seed)
    counts = np.bincount([sampler(logits) for _ in range(SAMPLES)], minlength=8)
    assert counts[expected == 0].sum() == 0
    support = expected > 0
    assert chisquare(counts[support], expected[support] * SAMPLES).pvalue > 1e-3


# Narrow, wide and flat distributions over vocabularies that are sorted whole and in part.
large_vectors = st.builds(
    lambda size, spread, steps, seed: (
        np.round(np.random.default_rng(seed).standard_normal(size) * spread * steps) / steps
    ).astype(np.float32),
    st.sampled_from([1, 2, 128, 129, 5_000, 16_384, 20_000, 49_152]),
    st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0]),
    st.sampled_from([1, 100_000]),  # 1: many ties
    st.integers(0, 2**32),
)
ROUNDING = 1e-5


def may_draw(
    logits: Logits, point: float, token: int, temperature: float, rest: tuple[float, int, float]
) -> bool:
    """Whether the reference draws the token at `point`, or does if its sums round otherwise."""
    top_p, top_k, min_p = rest
    for p, m in ((top_p, min_p), *((top_p + e, min_p * (1 + e)) for e in (-ROUNDING, ROUNDING))):
        ids, probabilities = distribution(logits, temperature, min(p, 1.0), top_k, m)
        place = np.flatnonzero(ids == token)
        if len(place):
            end = probabilities[: place[0] + 1].sum()
            begin = end - probabilities[place[0]]
            if begin - ROUNDING <= point <= end + ROUNDING:
                return True
    return False


@given(
    st.one_of(logit_vectors, large_vectors),
    temperatures,
    st.one_of(st.just(1.0), st.floats(0.01, 1)),
    st.one_of(st.just(0), st.integers(1, 70), st.integers(100, 6_000)),
    st.one_of(st.just(0.0), st.floats(1e-6, 1)),
    st.integers(0, 2**63),
    st.booleans(),
)
@settings(max_examples=300)
def test_a_sampler_draws_what_the_reference_does(
    logits: Logits,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int,
    masked: bool,
) -> None:
    """The same token for the same seed, also with tokens that must not follow."""
    if masked:
        logits = logits.copy()
        logits[np.random.default_rng(seed).permutation(len(logits))[1:][::2]] = -np.inf
    sampler = make_sampler(temperature, top_p, top_k, seed, min_p)
    points = np.random.default_rng(seed).random(3)
    for point in points:
        rest = (top_p, top_k, min_p)
        assert may_draw(logits, point, sampler(logits), temperature, rest)


@pytest.mark.parametrize("spread", [1.5, 3.0])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [(0.7, 1.0, 0, 0.0), (1.3, 0.9, 0, 0.0), (1.0, 1.0, 40, 0.0), (1.0, 1.0, 0, 0.05)],
)
def test_seeds_keep_their_tokens(
    spread: float, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    """Those of `Generator.choice` over the sorted vocabulary."""
    rng, generator = np.random.default_rng(0), np.random.default_rng(5)
    sampler = make_sampler(temperature, top_p, top_k, 5, min_p)
    for _ in range(20):
        logits = (rng.standard_normal(49_152) * spread).astype(np.float32)
        ids, probabilities = distribution(logits, temperature, top_p, top_k, min_p)
        assert sampler(logits) == generator.choice(ids, p=probabilities)


@given(st.one_of(logit_vectors, large_vectors), st.integers(0, 200))
def test_the_largest_logits_and_their_log_probabilities(logits: Logits, count: int) -> None:
    ids = largest_ids(logits, count)
    assert ids.tolist() == np.argsort(-logits, kind="stable")[:count].tolist()
    expected = log_softmax(logits.astype(np.float64))[ids]
    np.testing.assert_allclose(log_probabilities_of(logits, ids), expected, atol=1e-5)
