"""Parses and validates a manifest: types come from the dataclasses, value ranges from here."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar

from dlp_edge.bundle.manifest import (
    ADAPTER_NAME,
    BackboneEntry,
    Manifest,
    RouterEntry,
    RouterManifest,
    RouterSettings,
    Slot,
)
from dlp_edge.errors import DlpEdgeError

# Far above every real model, yet small enough that derived sizes cannot overflow.
LARGEST = {
    "context_length": 1 << 24,
    "vocab_size": 1 << 22,
    "num_layers": 1_000,
    "num_kv_heads": 1_000,
    "head_size": 4_096,
    "width": 1 << 20,
    "rank": 4_096,
    "adapters": 4_096,
    "slots": 8_000,
    "router_tokens": 4_096,
    "edition": 1 << 40,
    "file": 1 << 42,
}
MAX_TEXT = 1_000
MAX_TEMPLATE = 256 << 10
TARGETS = ("cpu", "cuda", "webgpu")
FORMATS = ("int8", "int4", "nf4", "fp16", "fp32")
ROUTERS = ("mlp", "albert")

# Fields that were added within the current version of the format; `manifest.py` has the rule.
OPTIONAL = frozenset({(RouterSettings, "spread"), (RouterEntry, "splitter")})

_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


class UnknownFieldError(ValueError):
    """The manifest has a field that this release does not know."""


def parse(kind: type[T], value: Any, where: str) -> T:
    """Builds a dataclass from JSON. Only fields in OPTIONAL may be missing.

    Args:
        where: path of the value in the document, for error messages.

    Raises:
        UnknownFieldError: there is an unknown field.
        ValueError: a field is missing or has the wrong type. The message names the field.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    hints = typing.get_type_hints(kind)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    required = {name for name in names if (kind, name) not in OPTIONAL}
    if unknown := value.keys() - names:
        raise UnknownFieldError(f"{where}.{min(unknown)[:100]} is unknown")
    if missing := required - value.keys():
        raise ValueError(f"{where}.{min(missing)} is missing")
    values = {name: _convert(hints[name], value[name], f"{where}.{name}") for name in value}
    try:
        return kind(**values)
    except DlpEdgeError as error:
        raise ValueError(f"{where}: {error.cause}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(inner, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is not an object")
        return {
            key: _convert(arguments[1], item, f"{where}.{key[:100]}") for key, item in value.items()
        }
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} has the unsupported value {str(value)[:100]!r}")
        return value
    if is_dataclass(hint):
        return parse(typing.cast("type[Any]", hint), value, where)
    if hint is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is not of type {hint.__name__}")
    return value


def check(manifest: Manifest) -> None:
    """Raises ValueError for values that an export never writes."""
    if manifest.targets != tuple(name for name in TARGETS if name in manifest.targets):
        raise ValueError(f"target has the unsupported value {manifest.target[:100]!r}")
    _range("edition", manifest.edition, 0, LARGEST["edition"])
    check_routing(manifest)
    _check_backbone(manifest.backbone)
    # A bundle for several targets is in single precision; CUDA then converts it (`half_graph.py`).
    if (manifest.backbone.dtype == "float16") != (manifest.target == "cuda"):
        raise ValueError(
            f"backbone.dtype {manifest.backbone.dtype} is not supported on {manifest.target}"
        )


def check_routing(manifest: Manifest | RouterManifest) -> None:
    """Raises ValueError for values that a bundle and a router folder share, and no export
    writes."""
    _text("created_with", manifest.created_with)
    if manifest.chat_template is not None and len(manifest.chat_template) > MAX_TEMPLATE:
        raise ValueError(f"chat_template is longer than {MAX_TEMPLATE} characters")
    for name, entry in manifest.files.items():
        _range(f"the size of {name[:100]}", entry.size, 0, LARGEST["file"])
        _sha256(name, entry.sha256)
    for name in ("name", "fingerprint", "bos_token", "eos_token"):
        _text(name, getattr(manifest.backbone, name))
    for name in ("context_length", "vocab_size"):
        _range(f"backbone.{name}", getattr(manifest.backbone, name), 1, LARGEST[name])
    for token in manifest.backbone.eos_token_ids:
        _range("an eos_token_id", token, 0, manifest.backbone.vocab_size - 1)
    _range("the number of adapters", len(manifest.adapters), 0, LARGEST["adapters"])
    _unique("adapter", (adapter.name for adapter in manifest.adapters))
    for adapter in manifest.adapters:
        if not ADAPTER_NAME.fullmatch(adapter.name):
            raise ValueError(f"{adapter.name[:100]!r} is not a valid adapter name")
        _range(f"the rank of {adapter.name}", adapter.rank, 1, LARGEST["rank"])
        _sha256(adapter.name, adapter.sha256)
        for module in adapter.target_modules:
            _text("target_modules", module)
    if manifest.router is not None:
        _check_router(manifest.router, {adapter.name for adapter in manifest.adapters})


def _check_backbone(entry: BackboneEntry) -> None:
    _text("architecture", entry.architecture)
    _one_of("backbone.quantisation", entry.quantisation, FORMATS)
    for name in ("num_layers", "num_kv_heads", "head_size"):
        _range(f"backbone.{name}", getattr(entry, name), 1, LARGEST[name])
    _range("the number of slots", len(entry.slots), 0, LARGEST["slots"])
    _unique("slot", (slot.name for slot in entry.slots))
    _unique("module", (part.module for slot in entry.slots for part in slot.parts))
    for slot in entry.slots:
        _check_slot(slot)


def _check_slot(slot: Slot) -> None:
    _text("a slot's name", slot.name)
    for name in ("input_size", "output_size"):
        _range(f"{slot.name}.{name}", getattr(slot, name), 1, LARGEST["width"])
    end = 0
    for part in sorted(slot.parts, key=lambda part: part.start):
        _text("a module's name", part.module)
        if not end <= part.start < part.stop <= slot.output_size:
            raise ValueError(f"the parts of slot {slot.name} overlap or lie outside it")
        end = part.stop


def _check_router(entry: RouterEntry, adapters: set[str]) -> None:
    settings = entry.settings
    _one_of("router.architecture", entry.architecture, ROUTERS)
    _unique("router label", settings.labels)
    for label in settings.labels:
        if label not in adapters:
            raise ValueError(f"router label {label[:100]!r} is not an adapter")
    _range("router.prompt_tokens", settings.prompt_tokens, 1, LARGEST["router_tokens"])
    _range("router.generated_tokens", settings.generated_tokens, 1, LARGEST["router_tokens"])
    if not 1e-6 <= settings.temperature <= 1e6:
        raise ValueError(f"router.temperature {settings.temperature} is out of range")


def _text(name: str, value: str) -> None:
    if len(value) > MAX_TEXT:
        raise ValueError(f"{name} has {len(value)} characters, the limit is {MAX_TEXT}")


def _range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]}, expected {least} to {most}")


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} has the unsupported value {value[:100]!r}")


def _sha256(name: str, value: str) -> None:
    if not _SHA256.fullmatch(value):
        raise ValueError(f"{name[:100]}: invalid SHA-256")


def _unique(kind: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"duplicate {kind} {name[:100]!r}")
        seen.add(name)
