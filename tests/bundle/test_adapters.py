"""Adapters as PEFT writes them: what can be fused equals PEFT, what cannot is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.errors import AdapterError
from dlp_edge.export.pipeline import export_bundle
from dlp_edge.runtime.decoding.engine import Engine
from tests.testing.engines import make_engine_for
from tests.testing.families import CONTEXT, make_adapter, make_backbone
from tests.testing.oracle import Peft

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(0).integers(0, 256, 100).tolist()

SHAPES: dict[str, dict[str, Any]] = {
    "list": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "regex": {"r": 3, "target_modules": r"model\.layers\.1\..*\.(k|up)_proj"},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "excluded": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "one-layer": {"r": 4, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    "one-layer-pattern": {
        "r": 4,
        "target_modules": ["v_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "rank-pattern": {"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 7}},
    "rank-and-alpha-pattern": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "rank_pattern": {r"layers\.0\..*q_proj": 1, "k_proj": 16},
        "alpha_pattern": {r"layers\.1\..*": 5, "k_proj": 3},
    },
    "rslora": {"r": 16, "lora_alpha": 6, "use_rslora": True, "target_modules": ["o_proj"]},
    "rslora-patterns": {
        "r": 8,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"up_proj": 1},
    },
    "rank-one": {"r": 1, "target_modules": ["gate_proj"]},
    "wider-than-the-layer": {"r": 100, "target_modules": ["k_proj"]},
}


def check(engine: Engine, oracle: Peft, fusion: dict[str, float]) -> None:
    expected = oracle.logits(IDS, fusion)
    engine.decoder.set_fusion(engine.fuser.fuse(fusion))
    engine.decoder.truncate(0)
    assert np.abs(engine.decoder.all_logits(IDS) - expected).max() <= 1e-3
    assert np.abs(expected - oracle.logits(IDS, {})).max() > 1e-2  # it does something


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone("llama3", tmp_path_factory.mktemp("backbone") / "backbone")


def test_every_shape_equals_peft_alone_and_fused(backbone: Path, tmp_path: Path) -> None:
    adapters = {
        name: make_adapter(backbone, tmp_path / name, **settings)
        for name, settings in SHAPES.items()
    }
    export_bundle(str(backbone), adapters, None, tmp_path / "bundle", "fp32")
    engine, oracle = make_engine_for(tmp_path / "bundle", CONTEXT), Peft(backbone, adapters)
    for name in SHAPES:
        check(engine, oracle, {name: 1.0})
    check(engine, oracle, {name: (i + 1) / 20 for i, name in enumerate(SHAPES)})


def test_one_bundle_holds_128_adapters(backbone: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model: Any = AutoModelForCausalLM.from_pretrained(backbone)
    for i in range(128):
        torch.manual_seed(i)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            init_lora_weights=False,
            r=int(rng.integers(1, 9)),
            lora_alpha=4,
            target_modules=rng.choice(modules, rng.integers(1, 4), replace=False).tolist(),
        )
        if i:
            model.add_adapter(f"a{i}", config)
        else:
            model = peft.get_peft_model(model, config, adapter_name="a0")
    model.save_pretrained(tmp_path / "adapters")
    adapters = {f"a{i}": tmp_path / "adapters" / f"a{i}" for i in range(128)}
    export_bundle(str(backbone), adapters, None, tmp_path / "bundle", "fp32")
    engine, oracle = make_engine_for(tmp_path / "bundle", CONTEXT), Peft(backbone, adapters)
    assert len(open_bundle(tmp_path / "bundle").manifest.adapters) == 128
    check(engine, oracle, {"a127": 1.0})
    for count in (2, 20, 128):
        names = rng.choice(sorted(adapters), count, replace=False)
        check(engine, oracle, {str(name): float(rng.normal()) / count**0.5 for name in names})


REFUSED: dict[str, tuple[Any, str]] = {
    "dora": (peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), "use_dora"),
    "lora-bias": (peft.LoraConfig(lora_bias=True, target_modules=["q_proj"]), "lora_bias"),
    "bias": (peft.LoraConfig(bias="lora_only", target_modules=["q_proj"]), "bias"),
    "head-saved": (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "modules_to_save",
    ),
    "head": (peft.LoraConfig(target_modules=["q_proj", "lm_head"]), "lm_head"),
    "embeddings": (peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]), "embed"),
    "tokens": (
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        "trainable_token_indices",
    ),
    "norms": (
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]),
        "modules_to_save",
    ),
    "ia3": (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
    "loha": (peft.LoHaConfig(target_modules=["q_proj"]), "LOHA"),
    "lokr": (peft.LoKrConfig(target_modules=["q_proj"]), "LOKR"),
    "vera": (peft.VeraConfig(target_modules=["o_proj"]), "VERA"),
    "adalora": (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA"),
    "oft": (peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4), "OFT"),
    "prompt": (peft.PromptTuningConfig(num_virtual_tokens=4), "PROMPT_TUNING"),
    "pissa": (peft.LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]), "pissa"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_arithmetic_cannot_carry_is_refused_by_name(
    backbone: Path, tmp_path: Path, kind: str
) -> None:
    config, word = REFUSED[kind]
    config.task_type = "CAUSAL_LM"
    base = AutoModelForCausalLM.from_pretrained(backbone)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / kind)
    with pytest.raises(AdapterError, match=f"adapter {kind}.*{word}"):
        export_bundle(str(backbone), {kind: tmp_path / kind}, None, tmp_path / "bundle", "fp32")
    assert [path.name for path in tmp_path.iterdir()] == [kind]
