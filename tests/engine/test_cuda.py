"""A bundle for CUDA: what it says on the CPU's arithmetic, and on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from dlp_edge import Runtime
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.export.pipeline import export_bundle
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.cuda_graphs import NOT_CAPTURED, CudaGraphs
from dlp_edge.runtime.engine.device import Device
from dlp_edge.runtime.fusion.on_device import OnDeviceFuser
from tests.testing.engines import make_engine_for

pytestmark = pytest.mark.slow

FUSIONS = [{}, {"sums": 1.0}, {"sql": 0.6, "sums": 0.4}, {"email": 0.5, "sql": 0.5}]
PROMPT = list(range(40, 90))
PROVIDER = "CUDAExecutionProvider"
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        PROVIDER not in ort.get_available_providers(), reason=f"no {PROVIDER} in onnxruntime"
    ),
]
devices = pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=gpu)])


@pytest.fixture(scope="module")
def cuda_bundle(
    tiny_backbone: Path,
    tiny_adapters: dict[str, Path],
    tiny_router: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "bundle"
    export_bundle(str(tiny_backbone), tiny_adapters, tiny_router, out, "fp16", "cuda")
    return out


def make(bundle: Path, kind: str, gathered: bool, sequences: int = 1) -> Engine:
    """An engine that fuses on the host or, `gathered`, where the backbone is."""
    opened = open_bundle(bundle)
    entry, device = opened.manifest.backbone, Device(kind, 1)
    engine = make_engine_for(bundle, 128, sequences, device)
    if not gathered:
        return engine
    fuser = OnDeviceFuser(opened.adapters(), entry.slots, entry.dtype, device, sequences)
    return replace(engine, fuser=fuser)


def logits_of(engine: Engine, fusion: dict[str, float]) -> np.ndarray:
    """After the prompt, and after each of three tokens more under another fusion."""
    decoder = engine.decoder
    decoder.truncate(0)
    decoder.set_fusion(engine.fuser.fuse(fusion))
    found = [decoder.prefill(PROMPT).astype(np.float32)]
    decoder.set_fusion(engine.fuser.fuse({"sums": 0.5}))
    found += [decoder.step([token])[0].astype(np.float32) for token in (60, 61, 62)]
    return np.stack(found)


@devices
@pytest.mark.parametrize("fusion", FUSIONS, ids=str)
def test_logits_are_those_of_a_host_that_fuses(
    cuda_bundle: Path, kind: str, fusion: dict[str, float]
) -> None:
    expected = logits_of(make(cuda_bundle, "cpu", gathered=False), fusion)
    found = logits_of(make(cuda_bundle, kind, gathered=True), fusion)
    assert np.abs(found - expected).max() < 0.1  # what half precision is worth here
    assert np.abs(expected).max() > 1


def test_captured_steps_are_told_apart_by_where_their_tensors_lie(cuda_bundle: Path) -> None:
    """Only a GPU captures; which graph a step would be, and its arithmetic, are the same here."""
    plain, engine = (make(cuda_bundle, "cpu", gathered=True) for _ in range(2))
    decoder = engine.decoder
    decoder._backbone = replace(decoder._backbone, cuda_graphs=CudaGraphs())
    numbers, found, expected = [], [], []
    for fusion in ({"sums": 1.0}, {"sql": 1.0}, {"sums": 0.5}, {"sums": 0.3, "sql": 0.7}, {}):
        for one, logits in ((engine, found), (plain, expected)):
            one.decoder.set_fusion(one.fuser.fuse(fusion))
            one.decoder.truncate(0)
            logits.append(one.decoder.prefill(PROMPT).copy())
            logits += [one.decoder.step([token])[0].copy() for token in (60, 61, 62)]
        numbers.append(decoder._graph_id(0, 1, is_prompt=False))
    np.testing.assert_array_equal(found, expected)
    sums, sql, again, both, base = numbers
    assert sums == again == base  # 8 rows in every slot at most
    assert sql == both != sums  # more than 16 in the slots of q, k and v
    assert decoder._graph_id(0, 1, is_prompt=True) == NOT_CAPTURED


@pytest.mark.gpu
@pytest.mark.skipif(PROVIDER not in ort.get_available_providers(), reason=f"no {PROVIDER}")
def test_captured_steps_answer_as_others_do(cuda_bundle: Path) -> None:
    opened = open_bundle(cuda_bundle)
    found = []
    for captures in (False, True):
        device = Device("cuda", 1, cuda_graphs=captures)
        backbone = open_backbone(cuda_bundle / "backbone.onnx", opened.manifest.backbone, device)
        assert (backbone.cuda_graphs is not None) == captures
        engine = make_engine(backbone, opened.adapters(), 128)
        found.append([logits_of(engine, fusion) for fusion in (*FUSIONS, *FUSIONS)])
    assert np.abs(np.array(found[0]) - np.array(found[1])).max() < 0.05


@devices
def test_a_batch_is_its_sequences_alone(cuda_bundle: Path, kind: str) -> None:
    one = make(cuda_bundle, kind, gathered=True)
    several = make(cuda_bundle, kind, gathered=True, sequences=len(FUSIONS))
    expected = []
    for sequence, fusion in enumerate(FUSIONS):
        for engine, at in ((one, 0), (several, sequence)):
            engine.decoder.set_fusion(engine.fuser.fuse(fusion, at))
            engine.decoder.truncate(0, at)
            engine.decoder.prefill(PROMPT[: 10 + sequence], at)
        expected.append(one.decoder.step([60])[0].copy())
    found = several.decoder.step([60] * len(FUSIONS))
    assert np.abs(found.astype(np.float32) - np.stack(expected)).max() < 0.1
    several.decoder.move(3, 1)
    several.decoder.set_fusion(several.fuser.move(3, 1))
    again = several.decoder.step([61] * len(FUSIONS))
    np.testing.assert_array_equal(again[1], again[3])


@pytest.mark.gpu
@pytest.mark.skipif(PROVIDER not in ort.get_available_providers(), reason=f"no {PROVIDER}")
def test_a_runtime_on_the_gpu(cuda_bundle: Path) -> None:
    with Runtime(cuda_bundle, max_context=256) as runtime:
        assert runtime.device == "cuda"
        asked = "Tom has 3 apples and buys 4. How many?"
        alone = [runtime.generate(asked, adapters=f, max_new_tokens=20).text for f in FUSIONS]
        each = [{"adapters": fusion} for fusion in FUSIONS]
        batch = runtime.generate_batch([asked] * len(FUSIONS), max_new_tokens=20, each=each)
        assert [reply.text for reply in batch] == alone
        chat = runtime.session()
        chat.send(asked, max_new_tokens=20)
        assert chat.send("And now?", max_new_tokens=20).timings.reused > 0
        stream = runtime.stream(asked, max_new_tokens=100)
        next(iter(stream))
        stream.cancel()
        assert stream.reply.finish_reason == "cancelled"
