"""Sampling."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from scipy.stats import chisquare

from dlp_edge.runtime.sampling import distribution, make_sampler

Logits = npt.NDArray[np.float32]
logit_vectors = arrays(
    np.float32, st.integers(2, 40), elements=st.floats(-20, 20, width=32), unique=True
)


@given(logit_vectors, st.floats(0.1, 5))
def test_unrestricted_distribution_is_the_softmax(logits: Logits, temperature: float) -> None:
    ids, probabilities = distribution(logits, temperature, 1.0, 0)
    expected = softmax(logits.astype(np.float64) / temperature)
    np.testing.assert_allclose(probabilities, expected[ids], atol=1e-9)
    assert sorted(ids) == list(range(len(logits)))


@given(logit_vectors, st.floats(0.05, 1), st.integers(0, 50))
def test_restrictions_keep_the_most_probable(logits: Logits, top_p: float, top_k: int) -> None:
    ids, probabilities = distribution(logits, 1.0, top_p, top_k)
    order = np.argsort(-logits)
    np.testing.assert_array_equal(ids, order[: len(ids)])
    assert abs(probabilities.sum() - 1) < 1e-9
    if top_k:
        assert len(ids) <= top_k
    among = softmax(logits[order[: top_k or None]].astype(np.float64))
    assert among[: len(ids)].sum() >= top_p - 1e-6
    assert among[: len(ids) - 1].sum() < top_p + 1e-6


@given(logit_vectors, st.integers(0, 2**31))
@settings(max_examples=30)
def test_a_seed_repeats_its_tokens(logits: Logits, seed: int) -> None:
    first, second = (make_sampler(1.0, 0.9, 0, seed) for _ in range(2))
    assert [first(logits) for _ in range(20)] == [second(logits) for _ in range(20)]


def test_samples_follow_the_distribution() -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0], np.float32)
    sampler = make_sampler(1.0, 1.0, 0, seed=0)
    counts = np.bincount([sampler(logits) for _ in range(20_000)], minlength=4)
    assert chisquare(counts, softmax(logits.astype(np.float64)) * 20_000).pvalue > 1e-3


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert make_sampler(0.0, 1.0, 0, None)(np.array([0.0, 3.0, 3.0], np.float32)) == 1
