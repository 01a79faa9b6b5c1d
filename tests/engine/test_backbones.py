"""Every supported family, exported in fp32, against transformers + PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlp_edge.errors import BackboneError
from dlp_edge.export.pipeline import export_bundle
from dlp_edge.models.architectures import SUPPORTED
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.engine.backbone import VERIFY_TOKENS
from tests.testing.engines import make_engine_for
from tests.testing.families import CONTEXT, EOS, FAMILIES, WINDOW, make_adapter, make_backbone
from tests.testing.oracle import Peft

pytestmark = pytest.mark.slow

FUSIONS: list[dict[str, float]] = [{}, {"all": 1.0}, {"attention": 1.0}, {"all": 0.6, "some": 0.4}]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "attention": {"r": 8, "lora_alpha": 8, "target_modules": r".*\.(q|v|qkv)_proj"},
    "some": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["k_proj", "qkv_proj", "o_proj", "down_proj"],
        "layers_to_transform": [1],
        "use_rslora": True,
    },
}
IDS = np.random.default_rng(0).integers(0, EOS, CONTEXT).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, Peft, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    backbone = make_backbone(request.param, folder / "backbone")
    adapters = {
        name: make_adapter(backbone, folder / name, **settings)
        for name, settings in ADAPTERS.items()
    }
    report = export_bundle(str(backbone), adapters, None, folder / "bundle", quantisation="fp32")
    return make_engine_for(folder / "bundle", CONTEXT), Peft(backbone, adapters), report


def test_logits_equal_pefts_in_one_pass_and_token_by_token(
    exported: tuple[Engine, Peft, dict[str, Any]],
) -> None:
    engine, oracle, _ = exported
    decoder = engine.decoder
    for fusion in FUSIONS:
        expected = oracle.logits(IDS, fusion)
        assert np.abs(expected).max() > 1  # the model says something
        decoder.set_fusion(engine.fuser.fuse(fusion))
        decoder.truncate(0)
        assert np.abs(decoder.all_logits(IDS) - expected).max() <= 1e-3
        decoder.truncate(0)
        half = CONTEXT // 2  # beyond the sliding window
        assert half > 2 * WINDOW
        decoder.prefill(IDS[:30])
        assert np.abs(decoder.prefill(IDS[30:half]) - expected[half - 1]).max() <= 1e-3
        stepped = np.stack([decoder.step([token])[0].copy() for token in IDS[half:]])
        assert np.abs(stepped - expected[half:]).max() <= 1e-3


def test_a_verify_pass_equals_steps_bit_for_bit(
    exported: tuple[Engine, Peft, dict[str, Any]],
) -> None:
    engine, _, _ = exported
    decoder = engine.decoder
    begun = 2 * WINDOW
    for fusion in FUSIONS:
        decoder.set_fusion(engine.fuser.fuse(fusion))
        decoder.truncate(0)
        decoder.prefill(IDS[:begun])
        ids = IDS[begun : begun + 2 * VERIFY_TOKENS]
        stepped = np.stack([decoder.step([token])[0].copy() for token in ids])
        decoder.truncate(begun)
        parts = (
            ids[:VERIFY_TOKENS],
            ids[VERIFY_TOKENS : VERIFY_TOKENS + 3],
            ids[VERIFY_TOKENS + 3 :],
        )
        verified = np.concatenate([decoder.verify(part).copy() for part in parts])
        np.testing.assert_array_equal(verified, stepped)


def test_the_report_says_how_exact(exported: tuple[Engine, Peft, dict[str, Any]]) -> None:
    _, _, report = exported
    assert report["perplexity"]["ratio"] == pytest.approx(1, abs=1e-4)
    assert report["parity"]["base"]["max_abs_difference"] <= 1e-3
    assert report["parity"]["fusion"]["max_abs_difference"] <= 1e-3


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"architectures": ["BertModel"]}, "architecture is BertModel"),
        ({"architectures": []}, "architecture is None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "scaled as yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "scaled as linear"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_before_any_work(
    tiny_backbone: Path, tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    config = json.loads((tiny_backbone / "config.json").read_text())
    other = tmp_path / "other"  # no weights: nothing but the configuration is read
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(BackboneError, match=cause) as caught:
        export_bundle(str(other), {}, None, tmp_path / "out")
    if "architectures" in changes:
        for name in SUPPORTED:
            assert name in caught.value.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_an_unsupported_gguf_file_is_refused_before_it_is_dequantised(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "starcoder")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BackboneError, match="architecture is starcoder") as caught:
        export_bundle(str(path), {}, None, tmp_path / "out")
    assert "llama" in caught.value.remedy


@pytest.mark.parametrize("quantisation", ["fp32", "int8"])
def test_a_graph_that_is_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantisation: str
) -> None:
    """The builder leaves a linear scaling of the rotary embedding out, and says nothing."""
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    backbone = make_backbone("smollm2", tmp_path / "backbone", rope_parameters=rope)
    monkeypatch.setattr("dlp_edge.models.architectures.ROPE_TYPES", ("linear",))
    with pytest.raises(BackboneError, match="is not the backbone"):
        export_bundle(str(backbone), {}, None, tmp_path / "out", quantisation)
    assert [path.name for path in tmp_path.iterdir()] == ["backbone"]
