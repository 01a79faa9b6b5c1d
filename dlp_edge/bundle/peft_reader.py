"""Reads PEFT LoRA adapters; refuses settings that a low-rank pair cannot represent."""

from __future__ import annotations

import hashlib
import math
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from dlp_edge.bundle.adapter_stack import LARGEST_SCALING, LoraPair, fits_half
from dlp_edge.bundle.manifest import AdapterEntry, check_adapter_name
from dlp_edge.errors import AdapterError
from dlp_edge.untrusted.regex_check import check_pattern
from dlp_edge.untrusted.regular_file import read_at_most
from dlp_edge.untrusted.safetensors_header import check_bytes
from dlp_edge.untrusted.strict_json import parse

Matrix = npt.NDArray[np.float32]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG = 1 << 20
MAX_PATTERNS = 2_000  # of ranks or alphas; each is tried on every module
MAX_COMPLEX_PATTERNS = 50
MAX_WEIGHTS = 2 << 30

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

# Settings of adapter_config.json that change the arithmetic, and the values that leave it as is.
_SUPPORTED = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False, None),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, ...) modify the backbone's weights, so
    # the pair alone does not reproduce the trained model.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT adapter: a low-rank pair for every linear layer it changes."""

    name: str
    folder: Path
    pairs: dict[str, LoraPair]
    sha256: str
    base_model: str | None

    def other_base(self, backbone: str) -> str | None:
        """A remark, if the configuration names another model than this backbone.

        Compares only the last path component, and accepts a backbone name that extends it.
        """
        own = Path(self.base_model or "").name.lower()
        if own in Path(backbone).name.lower():
            return None
        return (
            f"adapter {self.name} was trained on {self.base_model}, this backbone is called "
            f"{backbone}"
        )

    @property
    def entry(self) -> AdapterEntry:
        kinds = {_kind(module) for module in self.pairs}
        return AdapterEntry(
            name=self.name,
            rank=max(pair.a.shape[0] for pair in self.pairs.values()),
            target_modules=tuple(sorted(kinds)),
            sha256=self.sha256,
        )


def read_adapters(
    folders: Mapping[str, Path], sizes: Mapping[str, tuple[int, int]]
) -> list[PeftAdapter]:
    """Reads adapters (name -> folder) for a backbone.

    Args:
        sizes: module -> (input size, output size) of the backbone's linear layers.

    Raises:
        AdapterError: an adapter cannot be read, is of an unsupported kind, or does not fit the
            backbone; or two adapters have the same weights.
    """
    adapters = [
        read_adapter(name, folder, sizes, others=folders) for name, folder in folders.items()
    ]
    seen: dict[str, str] = {}
    for adapter in adapters:
        if adapter.sha256 in seen:
            raise AdapterError(
                f"adapters {seen[adapter.sha256]} and {adapter.name} have the same weights",
                "Leave one of them out",
            )
        seen[adapter.sha256] = adapter.name
    return adapters


def read_adapter(
    name: str,
    folder: Path,
    sizes: Mapping[str, tuple[int, int]],
    slots_only: bool = False,
    others: Iterable[str] = (),
) -> PeftAdapter:
    """Reads one adapter; see `read_adapters`.

    Args:
        slots_only: `sizes` covers the slots of an exported bundle, not all linear layers.
        others: the names of the adapters beside it.
    """
    wrong = check_adapter_name(name, others)
    if wrong is not None:
        raise AdapterError(f"{name!r} is not a valid adapter name", wrong)
    config = _read_config(name, folder)
    _check_supported(name, config)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise AdapterError(
            f"adapter {name}: {folder} has no {WEIGHTS}"
            + (", only a pickle file, which can run code when loaded" if pickled else ""),
            "Save the adapter with safe serialization (PEFT's default)",
        )
    arrays, digest = _read_weights(name, path)
    pairs = _pair_up(name, arrays, config, sizes, slots_only)
    base_model = config.get("base_model_name_or_path")
    if base_model is not None and not isinstance(base_model, str):
        raise AdapterError(
            f"adapter {name}: base_model_name_or_path in {CONFIG} is not a string", "Restore it"
        )
    return PeftAdapter(name, folder, pairs, digest, base_model)


def _read_weights(name: str, path: Path) -> tuple[dict[str, Matrix], str]:
    """Returns every tensor as float32, and the SHA-256 of the file."""
    try:
        data = read_at_most(path, MAX_WEIGHTS)
        check_bytes(data)
        tensors = deserialize(data)  # type: ignore[no-untyped-call]
        arrays = {
            key: _widen(tensor["dtype"], tensor["data"]).reshape(tensor["shape"])
            for key, tensor in tensors
        }
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise AdapterError(
            f"adapter {name}: {WEIGHTS} cannot be read ({error})", "Restore or retrain it"
        ) from error
    return arrays, hashlib.sha256(data).hexdigest()


def _widen(dtype: str, data: bytes) -> Matrix:
    """Converts a tensor's bytes to float32. Raises KeyError for an unsupported type."""
    if dtype == "BF16":  # the upper half of a float32; numpy has no such type
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    return np.frombuffer(data, kinds[dtype]).astype(np.float32)


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    try:
        config = parse(read_at_most(folder / CONFIG, MAX_CONFIG).removeprefix(BOM_UTF8))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"adapter {name}: {folder / CONFIG} cannot be read ({error})",
            "Give a folder written by PEFT's save_pretrained",
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(f"adapter {name}: {CONFIG} is not a JSON object", "Restore it")
    return config


def _check_supported(name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"adapter {name} is of type {kind}", "Use a LoRA adapter; other types cannot be fused"
        )
    for setting, supported in _SUPPORTED.items():
        if config.get(setting, supported[0]) not in supported:
            raise AdapterError(
                f"adapter {name} uses {setting}={config[setting]!r}, which a low-rank pair "
                "cannot represent",
                "Train it without that setting",
            )


def _pair_up(
    name: str,
    arrays: Mapping[str, Matrix],
    config: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    slots_only: bool,
) -> dict[str, LoraPair]:
    sides: dict[str, dict[str, Matrix]] = {}
    for key, array in arrays.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"adapter {name} has weights outside a linear layer's LoRA pair: {key}",
                "Train it without modules_to_save, embeddings or biases",
            )
        if not fits_half(array):
            raise AdapterError(
                f"adapter {name}: {key} has numbers that are not finite in half precision",
                "Retrain it",
            )
        sides.setdefault(match["module"], {})[match["side"]] = array
    if not sides:
        raise AdapterError(f"adapter {name} changes no modules", "Retrain it")
    return {
        module: _check_pair(name, module, pair, config, sizes, slots_only)
        for module, pair in sorted(sides.items())
    }


def _check_pair(
    name: str,
    module: str,
    pair: Mapping[str, Matrix],
    config: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    slots_only: bool,
) -> LoraPair:
    if set(pair) != {"A", "B"}:
        raise AdapterError(
            f"adapter {name} has only one of lora_A and lora_B for {module}", "Retrain it"
        )
    if module not in sizes:
        raise _no_such_module(name, module, sizes, slots_only)
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2:
        raise AdapterError(
            f"adapter {name}: lora_A and lora_B of {module} must be matrices", "Retrain it"
        )
    rank, (inputs, outputs) = a.shape[0], sizes[module]
    if a.shape != (rank, inputs) or b.shape != (outputs, rank) or rank == 0:
        raise AdapterError(
            f"adapter {name} was trained for another backbone: {module} is {inputs} -> {outputs} "
            f"here, its pair is {a.shape[-1]} -> {b.shape[0]}",
            f"Use its own backbone, {config.get('base_model_name_or_path')}",
        )
    expected = _setting(name, module, config, "r", "rank_pattern", 8)
    if rank != expected:
        raise AdapterError(
            f"adapter {name}: {module} has rank {rank}, {CONFIG} says {expected:g}",
            "Restore the configuration saved with the weights",
        )
    alpha = _setting(name, module, config, "lora_alpha", "alpha_pattern", 8)
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if abs(scaling) > LARGEST_SCALING:
        raise AdapterError(
            f"adapter {name} scales {module} by {scaling:g}", "Restore its configuration"
        )
    return LoraPair(a, np.ascontiguousarray(b.T), scaling)


def _no_such_module(
    name: str, module: str, sizes: Mapping[str, tuple[int, int]], slots_only: bool
) -> AdapterError:
    kinds = ", ".join(sorted({_kind(known) for known in sizes}))
    if slots_only:
        return AdapterError(
            f"adapter {name} changes {module}, but the bundle's graph has no slot for it",
            f"Export the bundle again with this adapter; its slots are {kinds or 'none'}",
        )
    return AdapterError(
        f"adapter {name} changes {module}, which matches no module of the backbone",
        f"Target only modules that each backbone layer has: {kinds}",
    )


def _kind(module: str) -> str:
    """Strips the layer prefix: `model.layers.3.self_attn.q_proj` -> `self_attn.q_proj`."""
    return re.sub(r"^model\.layers\.\d+\.", "", module)


@lru_cache(maxsize=2)
def _compiled(patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    """Compiles the patterns of module names.

    Raises:
        TypeError, ValueError, re.error: one is invalid, or they may take too long.
    """
    if len(patterns) > MAX_PATTERNS:
        raise ValueError(f"{len(patterns)} patterns, the limit is {MAX_PATTERNS}")
    complex_ones = 0
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except ValueError:
            check_pattern(pattern, risks=2)  # a module's name is short
            complex_ones += 1
    if complex_ones > MAX_COMPLEX_PATTERNS:
        raise ValueError(
            f"{complex_ones} patterns may backtrack, the limit is {MAX_COMPLEX_PATTERNS}"
        )
    return [re.compile(rf"(.*\.)?({pattern})") for pattern in patterns]


def _setting(
    name: str, module: str, config: Mapping[str, Any], key: str, patterns: str, default: float
) -> float:
    """Returns a number of the configuration.

    As in PEFT, the first pattern that matches the module overrides the common value.
    """
    value = config.get(key, default)
    overrides = config.get(patterns) or {}
    try:
        for pattern, special in zip(_compiled(tuple(overrides)), overrides.values(), strict=True):
            if pattern.fullmatch(module):
                value = special
                break
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise AdapterError(
            f"adapter {name}: invalid {patterns} in {CONFIG} ({error})", "Restore it"
        ) from error
    if type(value) not in (int, float) or not abs(value) < 1e15:
        raise AdapterError(f"adapter {name}: {key} in {CONFIG} is {value!r}", "Restore it")
    return float(value)
