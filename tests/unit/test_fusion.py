"""Fusing adapters into slots (eq. 6)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_edge.bundle.adapter_stack import LoraPair, pack, unpack
from dlp_edge.bundle.manifest import Slot, SlotPart
from dlp_edge.errors import UsageError
from dlp_edge.runtime.fusion.copying import CopyingFuser
from dlp_edge.runtime.options import parse_weights

PACKED = Slot("qkv", 6, 11, (SlotPart("q", 0, 5), SlotPart("v", 8, 11)))
SINGLE = Slot("down", 4, 6, (SlotPart("down", 0, 6),))
SIZES = {"q": (6, 5), "v": (6, 3), "down": (4, 6)}


def make_stack(
    ranks: dict[str, dict[str, int]],
) -> tuple[CopyingFuser, dict[str, dict[str, LoraPair]]]:
    rng = np.random.default_rng(0)
    adapters = {
        name: {
            module: LoraPair(
                rng.standard_normal((rank, SIZES[module][0])).astype(np.float32),
                rng.standard_normal((rank, SIZES[module][1])).astype(np.float32),
                float(rng.uniform(0.1, 4)),
            )
            for module, rank in modules.items()
        }
        for name, modules in ranks.items()
    }
    stack = pack(adapters, "float32")
    return CopyingFuser(stack, [PACKED, SINGLE], "float32"), {
        n: unpack(stack, n) for n in stack.rows
    }


RANKS = {"a": {"q": 2, "v": 3}, "b": {"q": 4, "down": 1}, "c": {"v": 1, "down": 2}}


@given(st.dictionaries(st.sampled_from(sorted(RANKS)), st.floats(-2, 2)))
@settings(max_examples=40)
def test_a_fusion_is_the_weighted_sum_of_its_adapters(weights: dict[str, float]) -> None:
    fuser, adapters = make_stack(RANKS)
    fuser.fuse({"a": 1.0, "b": 1.0, "c": 1.0})  # whatever was in the buffers must not matter
    tensors = fuser.fuse(weights)
    rng = np.random.default_rng(1)
    for slot in (PACKED, SINGLE):
        x = rng.standard_normal((2, slot.input_size)).astype(np.float32)
        expected = np.zeros((2, slot.output_size))
        for part in slot.parts:
            for name, weight in weights.items():
                if part.module in adapters[name]:
                    pair = adapters[name][part.module]
                    delta = weight * pair.scaling * (x @ pair.a.T) @ pair.b
                    expected[:, part.start : part.stop] += delta
        found = (x @ tensors[f"{slot.name}.A"][0].T) @ tensors[f"{slot.name}.B"][0]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_base_model_has_rank_zero() -> None:
    fuser, _ = make_stack(RANKS)
    tensors = fuser.fuse({"a": 0.0})
    assert tensors["qkv.A"].shape == (1, 0, 6)
    assert tensors["qkv.B"].shape == (1, 0, 11)


def test_pinned_weights() -> None:
    known = ["a", "b"]
    assert parse_weights("a", known) == {"a": 1.0}
    assert parse_weights(["a", "b"], known) == {"a": 1.0, "b": 1.0}
    assert parse_weights({"b": 0.3}, known) == {"b": 0.3}
    assert parse_weights({}, known) == {}
    with pytest.raises(UsageError, match="no adapter 'x'"):
        parse_weights("x", known)
    with pytest.raises(UsageError, match="finite"):
        parse_weights({"a": math.nan}, known)
