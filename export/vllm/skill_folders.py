"""Writes skills as PEFT folders that PEFT and vLLM read alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from dlp_edge.bundle.adapter_stack import LoraPair
from dlp_edge.bundle.peft_reader import CONFIG, WEIGHTS


def write_skill(pairs: Mapping[str, LoraPair], base_model: str, folder: Path) -> None:
    """Writes one skill; module -> pair.

    The scaling is part of B, and alpha is the rank: no reader has to agree with another one about
    rsLoRA or about patterns.
    """
    tensors = {}
    ranks = {module: pair.a.shape[0] for module, pair in pairs.items()}
    for module, pair in pairs.items():
        b = np.asarray(pair.b, np.float32).T * np.float32(pair.scaling)
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(
            pair.a, np.float32
        )
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
    rank = max(ranks.values())
    smaller = {module: own for module, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(pairs),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
