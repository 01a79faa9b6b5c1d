"""Bundles on onnxruntime's WebGPU provider, against the CPU (`.ci/webgpu`).

The fp32 format has the same arithmetic on both; quantised ones are compared with the CPU at the
accuracy level that WebGPU computes at. A driver that computes attention wrongly in long passes, as
Mesa's lavapipe does, is part of what is tested.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from dlp_edge import DeviceError, Runtime
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.engine import self_check
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.device import Device, choose_device
from dlp_edge.runtime.engine.graphs.webgpu_graph import for_webgpu
from dlp_edge.runtime.engine.providers import webgpu_devices
from tests.testing.paths import TINY

FOLDER = Path(os.environ.get("DLP_EDGE_WEBGPU_BUNDLES", "none"))
BUNDLES = sorted(path.parent for path in FOLDER.glob("*/manifest.json"))
FUSIONS: list[dict[str, float]] = [{}, {"all": 1.0}, {"all": 0.6, "attention": 0.4}]
LONG = [int(i) for i in np.random.default_rng(1).integers(40, 250, 150)]


def found() -> bool:
    try:
        return bool(webgpu_devices())
    except DeviceError:
        return False


pytestmark = pytest.mark.skipif(not (BUNDLES and found()), reason="runs in .ci/webgpu")
bundles = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)


def make(bundle: Path, kind: str, sequences: int = 1, context: int = 256) -> Engine:
    opened = open_bundle(bundle)
    device = Device("webgpu", 1)
    path, model = bundle / "backbone.onnx", None
    if kind == "cpu":
        device = choose_device("cpu", "cpu", 1).without_operators()
        model = for_webgpu(path.read_bytes())
    backbone = open_backbone(path, opened.manifest.backbone, device, model)
    return make_engine(backbone, opened.adapters(), context, sequences)


def answers(engine: Engine) -> np.ndarray:
    """Logits after a prompt and after steps, for every fusion."""
    found = []
    for fusion in FUSIONS:
        engine.fuse(fusion)
        engine.decoder.truncate(0)
        found.append(engine.decoder.prefill(LONG).copy())
        found += [engine.decoder.step([token])[0].copy() for token in (60, 61, 62)]
    return np.stack(found)


@bundles
def test_logits_are_the_cpus(bundle: Path) -> None:
    if "gemma" in bundle.name:
        pytest.skip("lavapipe computes Gemma 2's attention wrongly: see the self-check's test")
    expected = answers(make(bundle, "cpu"))
    difference = np.abs(answers(make(bundle, "webgpu")) - expected)
    assert difference.max() < 1e-3 * expected.std()


@bundles
def test_a_batch_is_its_sequences_alone(bundle: Path) -> None:
    if "gemma" in bundle.name:
        pytest.skip("see above")
    alone, several = make(bundle, "webgpu"), make(bundle, "webgpu", 4)
    expected = []
    for sequence, fusion in enumerate((*FUSIONS, {"attention": 0.7})):
        for engine, at in ((alone, 0), (several, sequence)):
            engine.fuse(fusion, at)
            engine.decoder.truncate(0, at)
            engine.decoder.prefill(LONG[: 30 + sequence], at)
        expected.append(alone.decoder.step([60])[0].copy())
    found = several.decoder.step([60] * 4)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)
    several.decoder.move(3, 1)
    several.decoder.set_fusion(several.fuser.move(3, 1))
    again = several.decoder.step([61] * 4)
    np.testing.assert_allclose(again[1], again[3], atol=1e-5)


def test_passes_that_a_driver_computes_wrongly_are_not_used() -> None:
    """Lavapipe's attention is wrong for 32 tokens and more: prompts are read 24 at a time."""
    [bundle] = [path for path in BUNDLES if path.name == "smollm2-fp32-webgpu"]
    assert make(bundle, "webgpu").decoder.longest_pass == 24


def test_a_broken_kernel_is_caught_and_the_cpu_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [bundle] = [path for path in BUNDLES if path.name == "smollm2-int4-webgpu"]
    with Runtime(bundle, device="cpu") as runtime:
        expected = runtime.generate("Hello", max_new_tokens=8, adapters="all").text
    with Runtime(bundle, device="webgpu") as runtime:
        assert runtime.device.kind == "webgpu"
        assert runtime.generate("Hello", max_new_tokens=8, adapters="all").text
    right = self_check._cached

    def broken(*arguments: object) -> np.ndarray:
        values = right(*arguments)  # type: ignore[arg-type]
        if arguments[4] == "webgpu":
            values[0, 0, 0, -1] += 0.1 * values.std()  # one key, after the last step
        return values

    monkeypatch.setattr(self_check, "_cached", broken)
    with pytest.raises(DeviceError, match="self-check"):
        Runtime(bundle, device="webgpu")
    monkeypatch.setattr(
        "dlp_edge.runtime.loaded_bundle.choose_device", lambda *_: Device("webgpu", 1, name="GPU")
    )
    with caplog.at_level(logging.WARNING, "dlp_edge"), Runtime(bundle) as runtime:
        assert runtime.device.kind == "cpu"
        assert "self-check" in runtime.device.reason
        assert runtime.generate("Hello", max_new_tokens=8, adapters="all").text == expected
    assert "The CPU takes over" in caplog.text


def test_a_bundle_for_the_cpu_is_not_run_on_a_gpu() -> None:
    with pytest.raises(DeviceError, match="exported for cpu"):
        Runtime(TINY / "int4", device="webgpu")
