"""Fuses LoRA adapters exactly: A stacked, and B beside each other, times weight and scaling.

The result is a PEFT folder like any other, of the sum of the ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"(base_model\.model\..+)\.lora_([AB])\.weight")

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """delta(x) = x A^T B^T, with A [r, h] and B [d, r]; the scaling is part of B."""

    a: Matrix
    b: Matrix


def read_skill(folder: Path) -> tuple[dict[str, Any], dict[str, Pair]]:
    """The configuration and the pairs, by module, of a PEFT folder.

    Raises:
        ValueError: it holds something that a low-rank pair cannot represent.
        OSError: it cannot be read.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    unsupported = [key for key in ("use_dora", "lora_bias", "modules_to_save") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise ValueError(f"{folder.name} is no plain LoRA adapter")
    sides: dict[str, dict[str, Matrix]] = defaultdict(dict)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder.name}/{WEIGHTS} is damaged ({error})") from error
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{folder.name} has the weights {key}")
        sides[match[1]][match[2]] = tensor.astype(np.float32)
    pairs = {}
    for module, side in sides.items():
        a, b = side["A"], side["B"]
        alpha = _setting(config, "alpha_pattern", module, config["lora_alpha"])
        scaling = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        pairs[module] = Pair(a, b * np.float32(scaling))
    return config, pairs


def fuse(skills: Mapping[Path, float]) -> dict[str, bytes]:
    """The files of the fusion of PEFT folders with their weights.

    Raises:
        ValueError, OSError: as `read_skill`.
    """
    parts: dict[str, list[Pair]] = defaultdict(list)
    base = ""
    for folder, weight in skills.items():
        config, pairs = read_skill(folder)
        base = str(config.get("base_model_name_or_path") or "")
        for module, pair in pairs.items():
            parts[module].append(Pair(pair.a, pair.b * np.float32(weight)))
    tensors, ranks = {}, {}
    for module, found in parts.items():
        a = np.concatenate([pair.a for pair in found], axis=0)
        b = np.concatenate([pair.b for pair in found], axis=1)
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b)
        ranks[module.removeprefix("base_model.model.")] = len(a)
    rank = max(ranks.values())
    smaller = {module: own for module, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return {
        CONFIG: json.dumps(config, indent=1).encode(),
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
    }


def _setting(config: Mapping[str, Any], patterns: str, module: str, default: float) -> float:
    """A number of the configuration; as in PEFT, the first pattern that fits overrides it."""
    name = module.removeprefix("base_model.model.")
    for pattern, value in (config.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return float(value)
    return float(default)
