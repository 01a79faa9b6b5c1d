"""The stacked-weight file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_edge.errors import BundleError
from dlp_edge.stack import LoraPair, from_bytes, pack, to_bytes, unpack

Adapters = dict[str, dict[str, LoraPair]]


@st.composite
def adapter_sets(draw: st.DrawFn) -> Adapters:
    """Up to five adapters of any ranks over up to three linear layers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = {"q": (6, 5), "v": (6, 3), "down": (4, 6)}
    adapters: Adapters = {}
    for index in range(draw(st.integers(1, 5))):
        modules = draw(st.sets(st.sampled_from(sorted(sizes)), min_size=1))
        adapters[f"a{index}"] = {}
        for module in sorted(modules):
            rank, (h, d) = draw(st.integers(1, 9)), sizes[module]
            a = rng.standard_normal((rank, h)).astype(np.float32)
            b = rng.standard_normal((rank, d)).astype(np.float32)
            adapters[f"a{index}"][module] = LoraPair(a, b, float(rng.uniform(0.1, 4)))
    return adapters


@given(adapter_sets())
@settings(max_examples=50)
def test_packing_round_trip(adapters: Adapters) -> None:
    stack = from_bytes(to_bytes(pack(adapters, "float32")))
    assert list(stack.rows) == list(adapters)
    for name, pairs in adapters.items():
        found = unpack(stack, name)
        assert found.keys() == pairs.keys()
        for module, pair in pairs.items():
            np.testing.assert_array_equal(found[module].a, pair.a)
            np.testing.assert_array_equal(found[module].b, pair.b)
            assert found[module].scaling == pair.scaling


def test_equal_ranks_are_the_papers_tensor() -> None:
    """With N adapters of one rank, A is the [N, r, h] of the paper, flattened."""
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((3, 2, 6)).astype(np.float32)
    b = np.zeros((2, 4), np.float32)
    stack = pack({f"a{n}": {"q": LoraPair(whole[n], b, 1.0)} for n in range(3)}, "float32")
    np.testing.assert_array_equal(stack.a["q"].reshape(3, 2, 6), whole)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_stack_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        from_bytes(data)


def test_rows_outside_the_tensors_are_refused() -> None:
    pair = LoraPair(np.ones((2, 4), np.float32), np.ones((2, 4), np.float32), 1.0)
    data = to_bytes(pack({"a": {"q": pair}}, "float32"))
    broken = data.replace(rb"[0, 2, 1.0]", rb"[1, 2, 1.0]")
    assert broken != data
    with pytest.raises(BundleError, match="outside"):
        from_bytes(broken)


def test_weights_that_are_not_finite_are_refused() -> None:
    pair = LoraPair(np.full((2, 4), np.nan, np.float32), np.ones((2, 4), np.float32), 1.0)
    with pytest.raises(BundleError, match="not finite"):
        from_bytes(to_bytes(pack({"a": {"q": pair}}, "float32")))
