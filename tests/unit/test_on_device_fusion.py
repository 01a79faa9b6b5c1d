"""`OnDeviceFuser` on the CPU's provider makes the same pairs as `CopyingFuser`, in batches too."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_edge.bundle.adapter_stack import AdapterStack, LoraPair, pack
from dlp_edge.bundle.manifest import Slot, SlotPart
from dlp_edge.runtime.engine.device import Device
from dlp_edge.runtime.fusion.copying import CopyingFuser
from dlp_edge.runtime.fusion.on_device import OnDeviceFuser

CPU = Device("cpu", 1)
# Two layers with q and v packed, in one of them an adapter changes less; and a single matrix.
SIZES = {"0.q": (6, 5), "0.v": (6, 3), "1.q": (6, 5), "1.v": (6, 3), "down": (4, 6)}
SLOTS = [
    *(
        Slot(f"{layer}.qkv", 6, 11, (SlotPart(f"{layer}.q", 0, 5), SlotPart(f"{layer}.v", 8, 11)))
        for layer in range(2)
    ),
    Slot("down", 4, 6, (SlotPart("down", 0, 6),)),
]
RANKS = {
    "a": {"0.q": 2, "0.v": 3, "1.q": 2, "1.v": 3},
    "b": {"0.q": 4, "1.q": 1, "down": 1},
    "c": {"1.v": 1, "down": 2},
}
weights = st.dictionaries(st.sampled_from(sorted(RANKS)), st.floats(-2, 2))


def make_stack(dtype: str) -> AdapterStack:
    rng = np.random.default_rng(0)
    return pack(
        {
            name: {
                module: LoraPair(
                    rng.standard_normal((rank, SIZES[module][0])),
                    rng.standard_normal((rank, SIZES[module][1])),
                    float(rng.uniform(0.1, 4)),
                )
                for module, rank in modules.items()
            }
            for name, modules in RANKS.items()
        },
        dtype,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 0.3)])
@given(st.lists(weights, min_size=3, max_size=3))
@settings(max_examples=25)
def test_the_pairs_are_those_of_the_host(
    dtype: str, tolerance: float, fusions: list[Mapping[str, float]]
) -> None:
    stack = make_stack(dtype)
    host = CopyingFuser(stack, SLOTS, dtype).sibling(3)
    device = OnDeviceFuser(stack, SLOTS, dtype, CPU).sibling(3)
    for sequence, fusion in enumerate(fusions):
        expected, found = host.fuse(fusion, sequence), device.fuse(fusion, sequence)
    expected, found = host.move(2, 0), device.move(2, 0)
    rng = np.random.default_rng(1)
    for slot in SLOTS:
        x = rng.standard_normal((3, 2, slot.input_size)).astype(np.float32)
        names = [f"{slot.name}.{side}" for side in "AB"]
        deltas = [
            x @ np.swapaxes(a, 1, 2).astype(np.float32) @ b.astype(np.float32)
            for a, b in (
                [expected[name] for name in names],
                [found[name].numpy() for name in names],
            )
        ]
        np.testing.assert_allclose(*deltas, atol=tolerance)
