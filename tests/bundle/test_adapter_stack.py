"""The stacked-weight file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_edge.bundle.adapter_stack import LoraPair, from_bytes, pack, to_bytes, unpack
from dlp_edge.errors import BundleError

Adapters = dict[str, dict[str, LoraPair]]

# Module names as backbones have them, and names that a careless parser would mix up.
module_names = st.sampled_from(
    ["layers.0.self_attn.q_proj", "layers.11.mlp.down_proj", "q", "q.A", "q.B", "A", "", "ä 层"]
) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
adapter_names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalings = st.floats(1e-6, 1e6) | st.sampled_from([1.0, 2.0, 16 / 8**0.5, 0.0, -1.0])


def random_pair(rng: np.random.Generator, rank: int, h: int, d: int, scaling: float) -> LoraPair:
    a = rng.standard_normal((rank, h)).astype(np.float32)
    return LoraPair(a, rng.standard_normal((rank, d)).astype(np.float32), scaling)


@st.composite
def adapter_sets(draw: st.DrawFn) -> Adapters:
    """1 to 128 adapters, each of any rank over any of up to four linear layers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = draw(
        st.dictionaries(
            module_names, st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4
        )
    )
    count = draw(st.integers(1, 6) | st.sampled_from([100, 127, 128]))
    if count > 6:
        names = [f"adapter {index}" for index in range(count)]
    else:
        names = draw(st.lists(adapter_names, min_size=count, max_size=count, unique=True))
    adapters: Adapters = {}
    for name in names:
        if count > 6:  # drawn by hypothesis these would take seconds
            modules = [module for module in sizes if rng.random() < 0.7]
            ranks = rng.integers(1, 65, len(modules)).tolist()
            factors = rng.uniform(0.1, 4, len(modules)).tolist()
        else:
            modules = draw(st.lists(st.sampled_from(sorted(sizes)), unique=True))
            ranks = [draw(st.integers(1, 64)) for _ in modules]
            factors = [draw(scalings) for _ in modules]
        adapters[name] = {
            module: random_pair(rng, rank, *sizes[module], factor)
            for module, rank, factor in zip(modules, ranks, factors, strict=True)
        }
    return adapters


@given(adapter_sets(), st.sampled_from(["float32", "float16"]))
@settings(deadline=None)  # 128 adapters take their time
def test_packing_round_trip(adapters: Adapters, dtype: str) -> None:
    """Through the bytes and back: every row, scaling and name, in its order."""
    stack = from_bytes(to_bytes(pack(adapters, dtype)))
    assert list(stack.rows) == list(adapters)
    for name, pairs in adapters.items():
        found = unpack(stack, name)
        assert list(found) == list(pairs)
        for module, pair in pairs.items():
            assert found[module].a.dtype == found[module].b.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(found[module].a, pair.a.astype(dtype))
            np.testing.assert_array_equal(found[module].b, pair.b.astype(dtype))
            assert found[module].scaling == pair.scaling


@given(adapter_sets())
@settings(deadline=None)
def test_no_padding_and_no_shared_rows(adapters: Adapters) -> None:
    """A module's tensors hold the rows of its adapters, each once, and nothing else."""
    stack = pack(adapters, "float32")
    for module, a in stack.a.items():
        rows = [stack.rows[name][module] for name in adapters if module in stack.rows[name]]
        taken = [row for at in rows for row in range(at.offset, at.offset + at.rank)]
        assert taken == list(range(a.shape[0])) == list(range(stack.b[module].shape[0]))


def test_equal_ranks_are_the_papers_tensor() -> None:
    """With N adapters of one rank, A is the [N, r, h] of the paper, flattened."""
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((3, 2, 6)).astype(np.float32)
    b = np.zeros((2, 4), np.float32)
    stack = pack({f"a{n}": {"q": LoraPair(whole[n], b, 1.0)} for n in range(3)}, "float32")
    np.testing.assert_array_equal(stack.a["q"].reshape(3, 2, 6), whole)


def small_file() -> bytes:
    rng = np.random.default_rng(0)
    first = {"q": random_pair(rng, 2, 4, 3, 0.5), "v": random_pair(rng, 1, 4, 3, 0.5)}
    return to_bytes(pack({"a": first, "b": {"q": random_pair(rng, 3, 4, 3, 2.0)}}, "float32"))


FILE = small_file()
HEADER_BYTES = 8 + int.from_bytes(FILE[:8], "little")


def with_header(header: dict[str, Any], body: bytes = FILE[HEADER_BYTES:]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def with_layout(layout: str) -> bytes:
    header = json.loads(FILE[8:HEADER_BYTES])
    return with_header({**header, "__metadata__": {"layout": layout}})


@given(st.binary(max_size=200))
def test_bytes_that_are_no_stack_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        from_bytes(data)


@given(st.integers(0, len(FILE) - 1))
def test_a_cut_file_is_refused(length: int) -> None:
    with pytest.raises(BundleError):
        from_bytes(FILE[:length])


@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1))
@settings(max_examples=300)
def test_a_damaged_header_gives_a_typed_error_or_a_sound_stack(
    changes: list[tuple[int, int]],
) -> None:
    data = bytearray(FILE)
    for at, byte in changes:
        data[at] = byte
    try:
        stack = from_bytes(bytes(data))
    except BundleError:
        return
    for name in stack.rows:
        for pair in unpack(stack, name).values():
            assert pair.a.shape[0] == pair.b.shape[0] > 0
            assert np.isfinite(pair.scaling)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)


@given(json_values)
def test_a_layout_of_any_json_gives_a_typed_error_or_no_adapters(layout: Any) -> None:
    try:
        stack = from_bytes(with_layout(json.dumps(layout)))
    except BundleError:
        return
    assert not any(stack.rows.values())


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("[0, 2]", "cannot be read"),
        ('[0, 2, "1"]', "cannot be read"),
        ("[0.5, 2, 1.0]", "cannot be read"),
        ("[true, 2, 1.0]", "cannot be read"),
        ("[Infinity, 2, 1.0]", "cannot be read"),
        (f"[0, 2, 1{'0' * 400}]", "cannot be read"),
        ("[4, 2, 1.0]", "outside"),
        ("[-1, 2, 1.0]", "outside"),
        ("[0, 0, 1.0]", "outside"),
        (f"[1{'0' * 400}, 2, 1.0]", "outside"),
        ("[0, 2, Infinity]", "cannot be read"),
        ("[0, 2, 1e300]", "scales"),
        ("[1, 2, 1.0]", "share rows"),
    ],
)
def test_rows_that_cannot_be_are_refused(row: str, cause: str) -> None:
    with pytest.raises(BundleError, match=cause):
        from_bytes(with_layout(f'{{"a": {{"q": {row}}}, "b": {{"q": [2, 3, 2.0]}}}}'))


def test_rows_of_an_unknown_module_are_refused() -> None:
    with pytest.raises(BundleError, match="outside"):
        from_bytes(with_layout('{"a": {"k": [0, 1, 1.0]}}'))


def test_a_layout_nested_without_end_is_refused() -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        from_bytes(with_layout("[" * 100_000))


@pytest.mark.parametrize("dtype", ["I32", "U8", "BOOL", "C64", "BF16", "F8_E4M3"])
def test_tensors_that_are_no_weights_are_refused(dtype: str) -> None:
    width = {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "BF16": 2, "C64": 8}.get(dtype, 4)
    offsets = [[0, 2 * width], [2 * width, 4 * width]]
    header: dict[str, Any] = {
        f"q.{part}": {"dtype": dtype, "shape": [1, 2], "data_offsets": at}
        for part, at in zip("AB", offsets, strict=True)
    }
    header["__metadata__"] = {"layout": '{"a": {"q": [0, 1, 1.0]}}'}
    with pytest.raises(BundleError, match=r"float type|cannot be read"):
        from_bytes(with_header(header, bytes(4 * width)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["a", "b"])
def test_weights_that_are_not_finite_are_refused(value: float, part: str) -> None:
    pair = LoraPair(np.ones((2, 4), np.float32), np.ones((2, 4), np.float32), 1.0)
    getattr(pair, part)[1, 2] = value
    with pytest.raises(BundleError, match="not finite"):
        from_bytes(to_bytes(pack({"a": {"q": pair}}, "float32")))
