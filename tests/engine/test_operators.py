"""Our own operator against numpy, with the instructions of each kind of processor."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlp_edge import Runtime
from dlp_edge.bundle.bundle import Bundle, open_bundle
from dlp_edge.bundle.files import BACKBONE, BACKBONE_DATA
from dlp_edge.errors import BundleError
from dlp_edge.export.quantisation.quantized_matrix import QuantizedMatrix
from dlp_edge.onnx_bytes.protobuf import parts, read_message, write_message
from dlp_edge.onnx_bytes.reader import FLOAT, FLOAT16, GRAPH, INT64, MODEL, NODE, UINT8
from dlp_edge.onnx_bytes.writer import make_model, make_node, make_value
from dlp_edge.runtime.decoding.engine import make_engine
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.device import Device, open_session
from dlp_edge.runtime.engine.operators import DOMAIN, OPERATORS_VARIABLE, find_operators
from dlp_edge.runtime.options import GenerateOptions
from tests.testing.paths import TINY

Array = npt.NDArray[Any]
BLOCK = 32
LIBRARY = find_operators()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="our own operator could not be built, or not for this processor"
)
several = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["avx2", "avx_vnni", "avx512_vnni", "neon", "dotprod"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(OPERATORS_VARIABLE, request.param)
    if find_operators() is None:
        pytest.skip("this processor has no such instructions")
    return str(request.param)


def run(kind: str, inputs: Mapping[str, Array | None], **numbers: int | list[int]) -> Array:
    """An operator alone; an input that is None is left out."""
    types = {"float32": FLOAT, "float16": FLOAT16, "int64": INT64, "uint8": UINT8}
    given = {name: array for name, array in inputs.items() if array is not None}
    values = [make_value(name, types[a.dtype.name], a.ndim) for name, a in given.items()]
    names = [name if name in given else "" for name in inputs]
    node = make_node(kind, names, ["out"], DOMAIN, **numbers)
    model = make_model([node], values, [make_value("out", FLOAT, 3)], (DOMAIN,))
    found: Array = open_session(model, Device("cpu", 2, LIBRARY)).run(None, given)[0]
    return found


def rounded(x: Array) -> Array:
    """x [.., K] as Linear rounds it: to int8, with a scale for each block of 32."""
    blocks = np.pad(x, (*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % BLOCK)))
    blocks = blocks.reshape(*x.shape[:-1], -1, BLOCK)
    most = np.abs(blocks).max(-1, keepdims=True)
    whole = np.rint(blocks * (np.float32(127) / np.where(most > 0, most, 1)))
    result: Array = (whole * (most / np.float32(127))).reshape(*x.shape[:-1], -1)
    return result


def make_levels(
    rng: np.random.Generator, bits: int, rows: int, blocks: int, zeros: bool
) -> QuantizedMatrix:
    levels = rng.integers(0, 1 << bits, (rows, blocks, BLOCK)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (rows, blocks)).astype(np.float16).astype(np.float32)
    some = rng.integers(0, 16, (rows, blocks)).astype(np.uint8) if zeros else None
    return QuantizedMatrix(bits, levels, scales, some)


def linear(x: Array, levels: QuantizedMatrix, means: int = 0, scales: str = "float32") -> Array:
    tensors = levels.tensors()
    inputs = {"x": x, **tensors, "zeros": tensors.get("zeros")}
    inputs["scales"] = tensors["scales"].astype(scales)
    return run("Linear", inputs, bits=levels.bits, means=means)


@several
@given(
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
    rows=st.integers(1, 70),
    width=st.integers(1, 700),
    shape=st.sampled_from([(1, 1), (1, 2), (3, 1), (1, 7), (1, 8), (1, 37)]),
    seed=st.integers(0, 99),
)
def test_linear_is_the_product(
    vectors: str, bits: int, zeros: bool, rows: int, width: int, shape: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    levels = make_levels(rng, bits, rows, -(-width // BLOCK), zeros and bits == 4)
    x = rng.standard_normal((*shape, width)).astype(np.float32)
    expected = rounded(x).astype(np.float64) @ levels.dense(10**6).T
    found = linear(x, levels)
    np.testing.assert_allclose(found, expected, atol=2e-3 if bits == 4 else 2e-2)
    np.testing.assert_array_equal(linear(x, levels, scales="float16"), found)


@several
@given(blocks=st.integers(1, 60), rows=st.integers(1, 40), seed=st.integers(0, 99))
def test_linear_takes_the_means_of_blocks(vectors: str, blocks: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = make_levels(rng, 4, rows, blocks + -(-blocks // BLOCK), True)
    x = rng.standard_normal((1, 9, blocks * BLOCK)).astype(np.float32)
    means = x.reshape(1, 9, blocks, BLOCK).mean(-1, dtype=np.float32)
    extended = np.concatenate([x, means, np.zeros((1, 9, -blocks % BLOCK), np.float32)], -1)
    expected = rounded(extended).astype(np.float64) @ levels.dense(10**6).T
    # A mean that rounds the other way is one step of a level more.
    np.testing.assert_allclose(linear(x, levels, means=1), expected, atol=0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_token_is_the_same_alone(vectors: str, bits: int) -> None:
    rng = np.random.default_rng(0)
    levels = make_levels(rng, bits, 65, 19, bits == 4)
    x = rng.standard_normal((1, 43, 19 * BLOCK)).astype(np.float32)
    together = linear(x, levels)
    for token in range(43):
        np.testing.assert_array_equal(
            linear(x[:, token : token + 1], levels)[:, 0], together[:, token]
        )


def test_what_is_not_finite_stays_so(vectors: str) -> None:
    levels = make_levels(np.random.default_rng(0), 4, 3, 2, True)
    for value in (np.inf, -np.inf, np.nan):
        x = np.ones((1, 1, 64), np.float32)
        x[0, 0, 40] = value
        assert not np.isfinite(linear(x, levels)).all()


def test_a_matrix_that_does_not_fit_is_refused() -> None:
    rng = np.random.default_rng(0)
    levels, x = make_levels(rng, 4, 5, 3, True), np.ones((1, 1, 96), np.float32)
    tensors: dict[str, Array] = levels.tensors()
    wrong: list[tuple[str, dict[str, Array]]] = [
        ("differ in width", {"x": np.ones((1, 1, 97), np.float32)}),
        ("differ in width", {"x": np.ones((1, 1, 64), np.float32)}),
        ("three axes", {"x": np.ones((1, 96), np.float32)}),
        ("number of bits", {"levels": tensors["levels"][..., :15]}),
        ("one scale", {"scales": tensors["scales"][:, :2]}),
        ("float or float16", {"scales": tensors["scales"].astype(np.int64)}),
        ("one zero", {"zeros": tensors["zeros"][:4]}),
        ("one zero", {"zeros": np.uint8(8)[...]}),
        ("differ in width", {"x": x[..., :0], "levels": tensors["levels"][:, :0]}),
    ]
    for message, change in wrong:
        with pytest.raises(Exception, match=message):
            run("Linear", {"x": x, **tensors, **change}, bits=4)
    with pytest.raises(Exception, match="4 or 8 bits"):
        run("Linear", {"x": x, **tensors}, bits=3)


def slot_inputs(
    rng: np.random.Generator, shape: tuple[int, int], k: int, columns: list[int], adapters: int
) -> dict[str, Array | None]:
    """Adapters of rank 0 to 9 whose rows lie anywhere among 5,000 numbers, two more parts than the
    slot has, and a matrix with three columns that belong to no part."""
    sequences, tokens = shape
    sizes = (sequences, len(columns) + 2, adapters)
    starts = rng.integers(0, 5000 - 9 * max(k, *columns), (*sizes, 2))
    ranks = rng.integers(0, 10, (*sizes, 1))
    tensors = make_levels(rng, 8, 3 + sum(columns), -(-k // BLOCK), False).tensors()
    return {
        "x": rng.standard_normal((sequences, tokens, k)).astype(np.float32),
        **tensors,
        "zeros": None,
        "adapters": rng.standard_normal(5000).astype(np.float16),
        "spans": np.concatenate([starts, ranks], -1).astype(np.int64),
        "weights": rng.standard_normal(sizes).astype(np.float32),
    }


def run_slot(inputs: dict[str, Array | None], columns: list[int]) -> Array:
    starts = [sum(columns[:part]) + 2 for part in range(len(columns))]
    return run("Linear", inputs, bits=8, slot=1, first=1, starts=starts, columns=columns)


@several
@given(
    shape=st.sampled_from([(1, 1), (1, 2), (4, 1), (1, 70), (2, 33)]),
    k=st.integers(1, 100),
    columns=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    adapters=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_slot_adds_each_sequences_adapters(
    vectors: str, shape: tuple[int, int], k: int, columns: list[int], adapters: int, seed: int
) -> None:
    inputs = slot_inputs(np.random.default_rng(seed), shape, k, columns, adapters)
    base = {name: inputs[name] for name in ("x", "levels", "scales")}
    expected = run("Linear", base, bits=8).astype(np.float64)
    numbers = inputs["adapters"].astype(np.float64)
    for sequence, x in enumerate(inputs["x"]):
        start = 2
        for part, width in enumerate(columns):
            for adapter in range(adapters):
                a, b, rank = inputs["spans"][sequence, 1 + part, adapter]
                rows_of_a = numbers[a : a + rank * k].reshape(rank, k)
                rows_of_b = numbers[b : b + rank * width].reshape(rank, width)
                weight = inputs["weights"][sequence, 1 + part, adapter]
                expected[sequence, :, start : start + width] += weight * (
                    x @ rows_of_a.T @ rows_of_b
                )
            start += width
    np.testing.assert_allclose(run_slot(inputs, columns), expected, atol=2e-3)


def test_a_slots_token_is_the_same_alone(vectors: str) -> None:
    inputs = slot_inputs(np.random.default_rng(3), (1, 41), 70, [90, 40], 2)
    together = run_slot(inputs, [90, 40])
    for token in range(41):
        alone = run_slot({**inputs, "x": inputs["x"][:, token : token + 1]}, [90, 40])
        np.testing.assert_array_equal(alone[:, 0], together[:, token])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("spans", lambda spans: spans + np.array([5000, 0, 1]), "not within the adapters"),
        ("spans", lambda spans: spans - np.array([0, 5000, 0]), "not within the adapters"),
        ("spans", lambda spans: spans + np.array([0, 0, 2**62]), "not within the adapters"),
        ("spans", lambda spans: spans - np.array([0, 0, 20]), "not within the adapters"),
        ("spans", lambda spans: spans[:, :1], "match the sequences"),
        ("weights", lambda weights: weights[..., :1], "match the sequences"),
        ("adapters", lambda numbers: numbers[:100], "not within the adapters"),
        ("x", lambda x: np.concatenate([x, x]), "match the sequences"),
    ],
)
def test_a_slot_refuses_what_does_not_fit(name: str, change: Any, message: str) -> None:
    inputs = slot_inputs(np.random.default_rng(0), (1, 3), 20, [30, 10], 2)
    inputs[name] = np.ascontiguousarray(change(inputs[name]))
    with pytest.raises(Exception, match=message):
        run_slot(inputs, [30, 10])


def test_a_slots_attributes_must_fit() -> None:
    inputs = slot_inputs(np.random.default_rng(0), (1, 3), 20, [30, 10], 2)
    attributes: dict[str, list[int]]
    for attributes in ({"starts": [0, 1]}, {"starts": [0] * 4}, {"columns": []}):
        fitting = {"starts": [2], "columns": [30]}
        with pytest.raises(Exception, match=r"contradict each other|not large enough"):
            run("Linear", inputs, bits=8, slot=1, first=1, **{**fitting, **attributes})
    with pytest.raises(Exception, match="not within y"):
        run("Linear", inputs, bits=8, slot=1, first=1, starts=[20], columns=[30])
    with pytest.raises(Exception, match="match the sequences"):
        run("Linear", inputs, bits=8, slot=1, first=2**63 - 1, starts=[2], columns=[30])


@pytest.mark.parametrize(
    "attributes",
    [
        {"bits": 0}, {"bits": -4}, {"bits": 2**32 + 4}, {"bits": 2**63 - 1}, {"bits": [8]},
        {"means": 2}, {"means": -1}, {"means": 2**32}, {"slot": 2}, {"slot": 2**32},
        {"first": -1}, {"first": -(2**63)}, {"first": 2**63 - 3}, {"first": 2**62},
        {"starts": [-1]}, {"starts": [2**63 - 1]}, {"starts": [-(2**63)]}, {"starts": 3},
        {"columns": [-1]}, {"columns": [2**63 - 1]}, {"columns": [-(2**63)]},
        {"starts": [2**62], "columns": [2**62]}, {"starts": [1] * 100, "columns": [1] * 100},
    ],
)  # fmt: skip
def test_a_strangers_attributes_are_errors(attributes: dict[str, Any]) -> None:
    inputs = slot_inputs(np.random.default_rng(0), (1, 3), 20, [30], 2)
    fitting: dict[str, Any] = {"bits": 8, "slot": 1, "first": 1, "starts": [2], "columns": [30]}
    coded = {
        name: [n % 2**64 for n in value] if isinstance(value, list) else value % 2**64
        for name, value in attributes.items()
    }
    with pytest.raises(Exception, match=r"Linear|Slot|attribute|not large enough"):
        run("Linear", inputs, **{**fitting, **coded})
    assert np.isfinite(run("Linear", inputs, **fitting)).all()


@pytest.mark.parametrize("name", ["x", "levels", "scales", "adapters", "spans", "weights"])
@pytest.mark.parametrize(
    "change",
    [
        lambda array: None,
        lambda array: array[..., :0],
        lambda array: array[:0],
        lambda array: array.reshape(-1),
        lambda array: array[..., None],
        lambda array: array.reshape(1, 1, 1, 1, 1, *array.shape),
        lambda array: array.astype(np.uint8 if array.dtype != np.uint8 else np.float32),
        lambda array: array.astype(np.int64 if array.dtype != np.int64 else np.float16),
    ],
    ids=["missing", "empty", "none", "flat", "an axis more", "many axes", "type", "other type"],
)
def test_a_strangers_inputs_are_errors(name: str, change: Any) -> None:
    inputs = slot_inputs(np.random.default_rng(0), (1, 3), 20, [30], 2)
    fitting = {"bits": 8, "slot": 1, "first": 1, "starts": [2], "columns": [30]}
    array = inputs[name]
    assert array is not None
    changed = change(array)
    if changed is not None and changed.shape == array.shape and changed.dtype == array.dtype:
        pytest.skip("flat already")
    with pytest.raises(Exception, match=r"Linear|Slot|[Ii]nput|type|Type"):
        run("Linear", {**inputs, name: changed}, **fitting)


def test_a_strangers_spans_ask_for_no_impossible_room() -> None:
    """A million tokens of one number, and spans of a million rows."""
    inputs = slot_inputs(np.random.default_rng(0), (1, 3), 1, [1], 1)
    numbers = np.zeros(1 << 20, np.float16)
    spans = np.zeros((1, 3, 4096, 3), np.int64)
    spans[..., 2] = len(numbers)
    inputs |= {
        "x": np.zeros((1, 1 << 20, 1), np.float32),
        "adapters": numbers,
        "spans": spans,
        "weights": np.zeros(spans.shape[:3], np.float32),
    }
    with pytest.raises(Exception, match="Failed to allocate"):
        run("Linear", inputs, bits=8, slot=1, first=1, starts=[0], columns=[1])


def test_an_onnxruntime_without_the_api_is_refused() -> None:
    """The library is given an OrtApiBase whose only API is version 1, or none at all."""
    assert LIBRARY is not None
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    reported: list[bytes] = []

    def report(_: int, message: bytes) -> int:
        reported.append(message)
        return 1

    status = create_status(report)
    oldest = (ctypes.c_void_p * 1)(ctypes.cast(status, ctypes.c_void_p))
    register = ctypes.CDLL(str(LIBRARY)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    for oldest_api, expected in ((ctypes.addressof(oldest), 1), (None, None)):
        get = get_api(lambda version, api=oldest_api: api if version == 1 else None)
        base = (ctypes.c_void_p * 1)(ctypes.cast(get, ctypes.c_void_p))
        assert register(None, base) == expected
    assert reported == [b"dlp_edge's operator needs onnxruntime 1.18 or later"]
    assert register(None, None) is None


def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPERATORS_VARIABLE, "0")
    assert find_operators() is None


@pytest.fixture(params=["int8", "int4"])
def quantised(request: pytest.FixtureRequest) -> Path:
    return TINY / str(request.param)


FUSIONS = [{}, {"sums": 1.0}, {"sql": 0.6, "email": 0.4}, {"sums": 0.2, "sql": -0.3, "email": 1.4}]


@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_logits_are_those_of_onnxruntimes_operators(
    quantised: Path, fusion: dict[str, float]
) -> None:
    """Up to what rounding activations to int8 is worth."""
    bundle = open_bundle(quantised)
    found = []
    for library in (LIBRARY, None):
        device = Device("cpu", 2, library)
        backbone = open_backbone(quantised / BACKBONE, bundle.manifest.backbone, device)
        assert backbone.custom_operators == (library is not None)
        engine = make_engine(backbone, bundle.adapters(), 256)
        engine.decoder.set_fusion(engine.fuser.fuse(fusion))
        found.append(engine.decoder.all_logits(list(range(40, 200))))
    spread = found[1].std()
    assert np.abs(found[0] - found[1]).mean() < 0.03 * spread
    assert spread > 0.1


def test_scales_are_narrowed_where_that_changes_little(quantised: Path) -> None:
    """A backbone whose weights were read has scales in half precision, and nearly the logits of
    one whose weights onnxruntime reads from the file."""
    bundle = open_bundle(quantised)
    entry, device = bundle.manifest.backbone, Device("cpu", 2, LIBRARY)
    model, graph = bundle.graph()
    weights = bundle.weights(graph)
    narrow = open_backbone(quantised / BACKBONE, entry, device, model, weights)
    halves = {n: a for n, a in narrow.weights.items() if n.endswith(".half")}
    assert len(halves) >= 4 * entry.num_layers
    for name, half in halves.items():
        scales = weights[name.removesuffix(".half")]
        assert half.dtype == np.float16
        allowed = np.maximum(np.abs(scales), np.abs(scales).mean()) * 2**-11
        assert (np.abs(half.astype(np.float64) - scales) <= allowed).all()
    logits = []
    for backbone in (narrow, open_backbone(quantised / BACKBONE, entry, device)):
        engine = make_engine(backbone, bundle.adapters(), 256)
        logits.append(engine.decoder.all_logits(list(range(40, 200))))
    spread = logits[1].std()
    assert np.abs(logits[0] - logits[1]).mean() < 0.03 * spread
    assert spread > 0.1


@pytest.mark.parametrize("factor", [1e-7, 1e7, np.nan])
def test_scales_that_half_precision_cannot_hold_stay(quantised: Path, factor: float) -> None:
    bundle = open_bundle(quantised)
    entry = bundle.manifest.backbone
    model, graph = bundle.graph()
    weights = bundle.weights(graph)
    device = Device("cpu", 1, LIBRARY)
    narrow = open_backbone(quantised / BACKBONE, entry, device, model, weights)
    one = next(name for name in narrow.weights if name.endswith(".half"))
    source = one.removesuffix(".half")
    weights[source] = weights[source] * np.float32(factor)
    changed = open_backbone(quantised / BACKBONE, entry, device, model, weights)
    assert one not in changed.weights
    np.testing.assert_array_equal(changed.weights[source], weights[source])


@pytest.mark.parametrize("lost", [1, 2], ids=["inputs", "outputs"])
def test_a_graph_that_lacks_something_is_a_bundle_error(quantised: Path, lost: int) -> None:
    """Whatever node it is: a bundle may be anybody's."""
    bundle = open_bundle(quantised)
    message = read_message(memoryview(bundle.graph()[0]), MODEL)
    graph = read_message(parts(message, 7)[0], GRAPH)
    nodes = parts(graph, 1)
    for index, part in enumerate(nodes):
        broken = write_message({**read_message(part, NODE), lost: []})
        changed = {**graph, 1: [*nodes[:index], broken, *nodes[index + 1 :]]}
        model = write_message({**message, 7: [write_message(changed)]})
        with pytest.raises(BundleError):
            open_backbone(
                quantised / BACKBONE, bundle.manifest.backbone, Device("cpu", 1, LIBRARY), model
            )


def test_weights_are_used_as_they_were_read(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not copied, but onnxruntime opens no file for them either."""
    copy = Path(shutil.copytree(quantised, tmp_path / "bundle"))
    read = Bundle.weights

    def spoil(self: Bundle, *arguments: Any) -> Any:
        found = read(self, *arguments)
        file = copy / BACKBONE_DATA
        file.write_bytes(bytes(file.stat().st_size))
        return found

    def answer() -> str:
        options = GenerateOptions(adapters="sums", max_new_tokens=40, speculate=True)
        with Runtime(copy) as runtime:
            return runtime.generate("ab ab ab ab ab", **options).text

    expected = answer()
    monkeypatch.setattr(Bundle, "weights", spoil)
    assert answer() == expected
