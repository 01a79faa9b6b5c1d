"""Bundles for CUDA on a real GPU, against PEFT and the CPU; `python -m benchmarks.gpu` runs them.

DLP_EDGE_GPU_BUNDLES names the folder that `tests.gpu.write_bundles` wrote.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.device import Device, choose_device
from tests.gpu.stub import find_stub
from tests.gpu.write_bundles import EXPECTED, FUSIONS, IDS

FOLDER = Path(os.environ.get("DLP_EDGE_GPU_BUNDLES", "none"))
BUNDLES = sorted(path.parent for path in FOLDER.glob("*/manifest.json"))
IS_STUB = os.environ.get("DLP_EDGE_GPU_STUB") == "1"  # tries these tests, which then must fail
HERE = "CUDAExecutionProvider" in ort.get_available_providers()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (BUNDLES and HERE) or (find_stub() is not None and not IS_STUB), reason="needs a GPU"
    ),
]
bundles = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)


def make(bundle: Path, device: Device, sequences: int = 1) -> Engine:
    opened = open_bundle(bundle)
    entry, read = opened.manifest.backbone, lambda: opened.weights(opened.graph()[1])
    backbone = open_backbone(bundle / "backbone.onnx", entry, device, reread=read)
    return make_engine(backbone, opened.adapters(), 128, sequences)


def logits(engine: Engine) -> np.ndarray:
    """After each of the last tokens, for each fusion."""
    found = []
    for fusion in FUSIONS:
        engine.fuse(fusion)
        engine.decoder.truncate(0)
        found.append(engine.decoder.prefill(IDS[:-4]).astype(np.float32))
        found += [engine.decoder.step([token])[0].astype(np.float32) for token in IDS[-4:]]
    return np.stack(found)


@bundles
def test_logits_are_the_cpus_and_pefts(bundle: Path) -> None:
    plain = logits(make(bundle, Device("cuda", 1)))
    expected = logits(make(bundle, choose_device("cpu", "cpu", 1).without_operators()))
    assert np.abs(plain - expected).max() < 0.1 * expected.std()
    if "-fp16" in bundle.name:
        source = np.load(FOLDER / "sources" / bundle.name.partition("-fp16")[0] / EXPECTED)
        assert np.abs(plain - source).max() < 0.05 * source.std()


@bundles
def test_captured_steps_are_the_others(bundle: Path) -> None:
    plain, captured = (make(bundle, Device("cuda", 1, cuda_graphs=on)) for on in (False, True))
    expected = logits(plain)
    for _ in range(2):  # captured, then replayed
        np.testing.assert_allclose(logits(captured), expected, atol=1e-2)


@bundles
def test_a_batch_is_its_sequences_alone(bundle: Path) -> None:
    device = Device("cuda", 1, cuda_graphs=True)
    one, several = make(bundle, device), make(bundle, device, len(FUSIONS))
    expected = []
    for sequence, fusion in enumerate(FUSIONS):
        for engine, at in ((one, 0), (several, sequence)):
            engine.fuse(fusion, at)
            engine.decoder.truncate(0, at)
            engine.decoder.prefill(IDS[: 10 + sequence], at)
        expected.append(one.decoder.step([60])[0].astype(np.float32))
    for _ in range(4):
        found = several.decoder.step([60] * len(FUSIONS)).astype(np.float32)
        for sequence in range(len(FUSIONS)):
            several.decoder.truncate(10 + sequence, sequence)
        np.testing.assert_allclose(found, np.stack(expected), atol=0.05)
