"""Every family and format on the CUDA provider, on a stub of CUDA (`.ci/gpu-stub`).

Kernels compute nothing there: this shows where nodes lie, and that steps can be captured. The
arithmetic is the CPU's in tests/engine/test_cuda.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from dlp_edge import Runtime
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.weight_file import Weights
from dlp_edge.errors import DeviceError, DeviceMemoryError
from dlp_edge.onnx_bytes.reader import FLOAT, FLOAT16
from dlp_edge.onnx_bytes.writer import gather_and_scale, make_model, make_node, make_value
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.engine import providers
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.device import Device
from dlp_edge.runtime.engine.graphs.half_graph import half_graph, half_weights
from dlp_edge.runtime.engine.graphs.verify_graph import make_verify_graph
from tests.gpu.stub import Stub, find_stub

FOLDER = Path(os.environ.get("DLP_EDGE_GPU_BUNDLES", "none"))
BUNDLES = sorted(path.parent for path in FOLDER.glob("*/manifest.json"))
SHARED = [path for path in BUNDLES if path.name == "smollm2-int8-cuda"]  # for the CPU, too
CUDA = "CUDAExecutionProvider"
FUSIONS: list[dict[str, float]] = [{}, {"all": 1.0}, {"all": 0.6, "attention": 0.4}]

STUB = find_stub() if BUNDLES else None
pytestmark = pytest.mark.skipif(STUB is None, reason="runs in .ci/gpu-stub")
bundles = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)


@pytest.fixture
def stub() -> Iterator[Stub]:
    assert STUB is not None
    STUB.reset()
    yield STUB
    STUB.limit(-1)


def graph_of(bundle: Path) -> tuple[bytes, Weights]:
    """The graph that CUDA runs, and its weights."""
    opened = open_bundle(bundle)
    data, graph = opened.graph()
    weights = opened.weights(graph)
    if opened.manifest.targets == ("cuda",):
        return data, weights
    return half_graph(data), half_weights(weights)


def placement(model: bytes, weights: Weights | None = None) -> Counter[str]:
    """How many nodes of a graph lie on CUDA, and how many of each kind elsewhere."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    values = {n: ort.OrtValue.ortvalue_from_numpy(w) for n, w in (weights or {}).items()}
    options.add_external_initializers(list(values), list(values.values()))
    session = ort.InferenceSession(model, options, providers=[CUDA])
    return Counter(
        "on CUDA" if part.ep_name == CUDA else f"{node.domain}:{node.op_type}"
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    )


@bundles
def test_every_node_lies_on_cuda(bundle: Path) -> None:
    graph, weights = graph_of(bundle)
    for model in (graph, make_verify_graph(graph, 8)):
        found = placement(model, weights)
        assert set(found) == {"on CUDA"}
        assert found["on CUDA"] > 10


def test_the_fusers_graph_lies_on_cuda() -> None:
    assert set(placement(gather_and_scale(FLOAT16))) == {"on CUDA"}


@bundles
@pytest.mark.parametrize("sequences", [1, 4])
def test_steps_are_captured_as_cuda_allows(bundle: Path, sequences: int, stub: Stub) -> None:
    quantisation = open_bundle(bundle).manifest.backbone.quantisation
    engine = make(bundle, sequences)
    stub.reset()
    steps(engine, sequences)
    counts = stub.counts()
    assert counts.illegal() == {}
    if quantisation == "nf4":  # MatMulBnb4 copies its table from the stack
        assert counts.captures == counts.replays == 0
    else:
        assert counts.captures > 0
        assert counts.replays > counts.captures
        assert counts.captured_launches > 0


@bundles
def test_a_verify_pass_runs(bundle: Path) -> None:
    decoder = make(bundle, 1).decoder
    decoder.prefill(list(range(40, 90)))
    assert decoder.verify([60, 61, 62]).shape == (3, decoder.step([63]).shape[1])


def test_a_node_without_a_kernel_is_noticed() -> None:
    """The negative control: CUDA has no Det."""
    model = two_nodes("Relu", "Det")
    assert placement(model) == {"on CUDA": 1, ":Det": 1}
    with pytest.raises(Exception, match="graph capture"):
        ort.InferenceSession(model, providers=[(CUDA, {"enable_cuda_graph": "1"})])


@pytest.mark.parametrize("bundle", [b for b in BUNDLES if "-nf4" in b.name][:1], ids=str)
def test_an_illegal_copy_is_noticed(
    bundle: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: nf4, captured all the same."""
    monkeypatch.setattr("dlp_edge.runtime.engine.backbone.NOT_CAPTURED_FORMATS", ())
    engine = make(bundle, 1)
    stub.reset()
    steps(engine, 1)
    assert stub.counts().illegal().keys() == {"pageable_copies"}


@pytest.mark.parametrize("bundle", SHARED, ids=str)
@pytest.mark.parametrize(
    ("variable", "value", "cause"),
    [
        ("STUB_NO_DRIVER", "1", "no driver"),
        ("STUB_CUDA_VERSION", "12040", "supports CUDA 12.4"),
        ("STUB_FREE_BYTES", "1000", "are free"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_explained_and_the_cpu_answers(
    bundle: Path, variable: str, value: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Runtime(bundle, max_context=256) as runtime:
        assert str(runtime.device) == "cuda (RTX 2080 Ti (stub), driver 580.65.06)"
        assert runtime.device.reason == ""
    monkeypatch.setenv(variable, value)
    with Runtime(bundle, max_context=256) as runtime:
        assert runtime.device.kind == "cpu"
        assert cause in runtime.device.reason
    with pytest.raises(DeviceError, match=cause):
        Runtime(bundle, device="cuda", max_context=256)


@pytest.mark.parametrize("bundle", SHARED, ids=str)
def test_a_missing_library_of_cuda_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers._CUDA_LIBRARIES, "cublasXt", "nvidia-cublas")
    with pytest.raises(DeviceError, match=r"libcublasXt\.so\.13 is missing") as caught:
        Runtime(bundle, device="cuda", max_context=256)
    assert 'pip install "nvidia-cublas' in caught.value.remedy


@pytest.mark.parametrize("bundle", SHARED, ids=str)
def test_memory_that_runs_out_while_loading_leaves_the_cpu(bundle: Path, stub: Stub) -> None:
    stub.limit(64 << 10)
    with Runtime(bundle, max_context=256) as runtime:
        assert runtime.device.kind == "cpu"
        assert "not enough free memory" in runtime.device.reason


@pytest.mark.parametrize("bundle", BUNDLES[:1], ids=str)
def test_a_device_without_memory_is_a_typed_error(bundle: Path, stub: Stub) -> None:
    stub.limit(64 << 10)
    with pytest.raises(DeviceMemoryError) as caught:
        Runtime(bundle, device="cuda", max_context=256)
    assert "cpu" in caught.value.remedy.lower()


def make(bundle: Path, sequences: int) -> Engine:
    opened = open_bundle(bundle)
    backbone = open_backbone(
        bundle / "backbone.onnx",
        opened.manifest.backbone,
        Device("cuda", 1, cuda_graphs=True),
        reread=lambda: opened.weights(opened.graph()[1]),
    )
    return make_engine(backbone, opened.adapters(), 128, sequences)


def steps(engine: Engine, sequences: int) -> None:
    """Prompts, and steps under several fusions: each fusion's rank is captured once."""
    for fusion in (*FUSIONS, *FUSIONS):
        for sequence in range(sequences):
            engine.decoder.set_fusion(engine.fuser.fuse(fusion, sequence))
            engine.decoder.truncate(0, sequence)
            engine.decoder.prefill(list(range(40, 90)), sequence)
        for token in range(60, 64):
            logits = engine.decoder.step([token] * sequences)
            assert logits.shape[0] == sequences
            assert not np.isnan(logits).any()


def two_nodes(first: str, second: str) -> bytes:
    nodes = [make_node(first, ["x"], ["y"]), make_node(second, ["y"], ["z"])]
    return make_model(nodes, [make_value("x", FLOAT, 2)], [make_value("z", FLOAT, 0)])
