"""Which device a bundle gets, what is said about it, and graphs for devices that are not here."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.manifest_parser import check
from dlp_edge.errors import DeviceError, DeviceMemoryError, UsageError
from dlp_edge.runtime.decoding.engine import captures_are_right, make_engine
from dlp_edge.runtime.engine import providers, self_check
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.cuda_graphs import NOT_CAPTURED, CudaGraphs
from dlp_edge.runtime.engine.device import choose_device, fallback_device
from dlp_edge.runtime.engine.graphs.half_graph import half_graph, half_weights
from dlp_edge.runtime.engine.graphs.webgpu_graph import for_webgpu
from dlp_edge.runtime.engine.interrupt import run_bound
from dlp_edge.runtime.engine.nvidia import Gpu
from tests.testing.paths import TINY

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 250, 60)]
FUSIONS: list[dict[str, float]] = [{}, {"sums": 1.0}, {"sums": 0.6, "sql": 0.4}]
CARD = Gpu("RTX 2080 Ti", "580.65.06", (13, 0), 10 << 30, 11 << 30)
ALL = "cpu,cuda,webgpu"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu | None], None]:
    """An onnxruntime-gpu for CUDA 13 with its libraries, and the GPU that is given."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(providers.PROVIDERS.values()))
    monkeypatch.setattr(ort, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(ort, "preload_dlls", lambda **_: None, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    return lambda gpu: monkeypatch.setattr(providers, "find_gpu", lambda: gpu)


@pytest.fixture
def webgpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    found = [SimpleNamespace(device=SimpleNamespace(vendor="AMD"))]
    return lambda there: monkeypatch.setattr(
        providers, "webgpu_devices", lambda: found if there else []
    )


def test_auto_prefers_cuda_then_webgpu_then_the_cpu(
    cuda: Callable[[Gpu | None], None], webgpu: Callable[[bool], None]
) -> None:
    cuda(CARD)
    webgpu(True)
    chosen = choose_device("auto", ALL, 1)
    assert str(chosen) == "cuda (RTX 2080 Ti, driver 580.65.06)"
    assert chosen.cuda_graphs
    cuda(None)
    chosen = choose_device("auto", ALL, 1)
    assert str(chosen) == "webgpu (AMD, experimental)"
    assert chosen.reason == "not cuda: there is no NVIDIA GPU, or no driver for it"
    webgpu(False)
    chosen = choose_device("auto", ALL, 1)
    assert chosen.kind == "cpu"
    assert chosen.reason.count("not ") == 2
    assert choose_device("auto", "cpu", 1).reason == ""
    with pytest.raises(DeviceError, match="no NVIDIA GPU"):
        choose_device("cuda", ALL, 1)
    with pytest.raises(DeviceError, match="no NVIDIA GPU"):
        choose_device("auto", "cuda", 1)


def test_a_bundle_that_does_not_fit_goes_elsewhere(
    cuda: Callable[[Gpu | None], None], webgpu: Callable[[bool], None]
) -> None:
    cuda(replace(CARD, free=1 << 30))
    webgpu(False)
    assert choose_device("auto", ALL, 1, needed=100 << 20).kind == "cuda"
    assert "1.1 of 11.8 GB are free" in choose_device("auto", ALL, 1, needed=2 << 30).reason
    with pytest.raises(DeviceMemoryError, match=r"2\.7 GB on the GPU"):
        choose_device("cuda", ALL, 1, needed=2 << 30)


def test_an_old_driver_and_a_missing_library_are_named(
    cuda: Callable[[Gpu | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda(replace(CARD, driver="550.54", cuda=(12, 4)))
    with pytest.raises(DeviceError, match=r"550\.54 supports CUDA 12\.4, .* needs CUDA 13"):
        choose_device("cuda", "cuda", 1)

    def missing(name: str) -> None:
        if "cublasLt" in name:
            raise OSError(name)

    cuda(CARD)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(DeviceError, match=r"cublasLt.*13.* is missing") as caught:
        choose_device("cuda", "cuda", 1)
    assert "nvidia-cublas" in caught.value.remedy


def test_a_device_that_fails_leaves_the_cpu_unless_it_was_asked_for(
    webgpu: Callable[[bool], None],
) -> None:
    webgpu(True)
    failed, error = choose_device("webgpu", ALL, 3), DeviceError("it is broken", "Mend it")
    fallback = fallback_device("auto", failed, ALL, error)
    assert (fallback.kind, fallback.threads) == ("cpu", 3)
    assert fallback.reason == "not webgpu: it is broken"
    for requested, target in (("webgpu", ALL), ("auto", "webgpu")):
        with pytest.raises(DeviceError, match="it is broken"):
            fallback_device(requested, failed, target, error)


def test_unknown_devices_and_targets_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown device"):
        choose_device("tpu", "cpu", 1)
    with pytest.raises(DeviceError, match="exported for cpu and webgpu, not for cuda"):
        choose_device("cuda", "cpu,webgpu", 1)
    manifest = open_bundle(TINY / "int8").manifest
    for target in ("cpu", "cpu,webgpu", ALL):
        check(replace(manifest, target=target))
    for target in ("tpu", "webgpu,cpu", "cpu,cpu", "", "cuda"):  # in single precision: not CUDA's
        with pytest.raises(ValueError, match=r"target|dtype"):
            check(replace(manifest, target=target))


@pytest.mark.parametrize("name", ["bundle", "int8", "int4"])
def test_the_graph_for_webgpu_and_the_one_in_half_precision_compute_the_same(name: str) -> None:
    """On the CPU, with onnxruntime's operators: where the levels' arithmetic is the same."""
    opened = open_bundle(TINY / name)
    model, graph = opened.graph()
    weights, entry = opened.weights(graph), opened.manifest.backbone
    device = choose_device("cpu", "cpu", 1).without_operators()

    def logits(model: bytes, half: bool = False) -> np.ndarray:
        own = half_weights(weights) if half else weights
        kind = replace(entry, dtype="float16" if half else "float32")
        backbone = open_backbone(TINY / name / "backbone.onnx", kind, device, model, own)
        engine = make_engine(backbone, opened.adapters(), 128)
        found = []
        for fusion in FUSIONS:
            engine.fuse(fusion)
            engine.decoder.truncate(0)
            found.append(engine.decoder.prefill(IDS).astype(np.float32))
            found.append(engine.decoder.step([60])[0].astype(np.float32))
        return np.stack(found)

    exact = logits(for_webgpu(model))  # without an accuracy_level
    assert np.abs(exact).max() > 1
    if name == "bundle":
        np.testing.assert_allclose(exact, logits(model), atol=1e-5)
    assert np.abs(logits(half_graph(model), half=True) - exact).max() < 0.05


@pytest.mark.parametrize("wrong", [False, True])
def test_captured_steps_are_compared_with_others(
    monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    """The CPU captures nothing: a wrong replay is put into the passes with a graph's id."""
    opened = open_bundle(TINY / "bundle")
    device = choose_device("cpu", "cpu", 1)
    backbone = open_backbone(TINY / "bundle" / "backbone.onnx", opened.manifest.backbone, device)
    engine = make_engine(replace(backbone, cuda_graphs=CudaGraphs()), opened.adapters(), 64)
    ids: list[int | None] = []

    def run(session: Any, binding: Any, interrupt: Any, graph_id: int | None = None) -> None:
        run_bound(session, binding, interrupt)
        ids.append(graph_id)
        if wrong and graph_id == 1 and ids.count(1) > 3:  # a replay
            engine.decoder._logits.host[0, 0, 5] += 1

    monkeypatch.setattr("dlp_edge.runtime.engine.decoder.run_bound", run)
    assert captures_are_right(engine) == (not wrong)
    assert set(ids) == {NOT_CAPTURED, 1}
    assert engine.decoder.lengths[0] == 0


@pytest.mark.parametrize(("wrong_from", "expected"), [(1000, 512), (32, 24), (1, None)])
def test_the_self_check_finds_wrong_passes_and_wrong_kernels(
    monkeypatch: pytest.MonkeyPatch, wrong_from: int, expected: int | None
) -> None:
    """On the CPU, in the part of a GPU."""
    opened = open_bundle(TINY / "int8")
    model = for_webgpu(opened.graph()[0])
    device = choose_device("cpu", "cpu", 1).without_operators()
    right, calls = self_check._cached, list[int]()

    def cached(*arguments: Any) -> np.ndarray:
        values, chunk = right(*arguments), arguments[5]
        calls.append(chunk)
        if len(calls) > 1 and chunk >= wrong_from:  # the first is the CPU's own
            values[0, 0, 0, -1, 0] += 0.1
        return values

    monkeypatch.setattr(self_check, "_cached", cached)
    checked = (model, opened.manifest.backbone, device, None, TINY / "int8")
    if expected is not None:
        assert self_check.largest_right_chunk(*checked) == expected
    else:
        with pytest.raises(DeviceError, match="self-check"):
            self_check.largest_right_chunk(*checked)
