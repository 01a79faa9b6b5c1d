"""The compatibility rule of `dlp_edge/bundle/manifest.py`: what changes the format's version."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import pytest

from dlp_edge.bundle import manifest
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.bundle.manifest_parser import OPTIONAL, UnknownFieldError, parse

# The required fields of version 2. A change here without another VERSION breaks bundles that exist.
VERSION_2 = {
    "Manifest": {
        "created_with": "str",
        "target": "str",
        "backbone": "BackboneEntry",
        "chat_template": "str | None",
        "adapters": "tuple[AdapterEntry, ...]",
        "router": "RouterEntry | None",
        "files": "dict[str, FileEntry]",
        "edition": "int",
    },
    "BackboneEntry": {
        "name": "str",
        "fingerprint": "str",
        "architecture": "str",
        "quantisation": "str",
        "dtype": "Literal['float32', 'float16']",
        "context_length": "int",
        "vocab_size": "int",
        "num_layers": "int",
        "num_kv_heads": "int",
        "head_size": "int",
        "bos_token": "str",
        "eos_token": "str",
        "eos_token_ids": "tuple[int, ...]",
        "slots": "tuple[Slot, ...]",
    },
    "Slot": {
        "name": "str",
        "input_size": "int",
        "output_size": "int",
        "parts": "tuple[SlotPart, ...]",
    },
    "SlotPart": {"module": "str", "start": "int", "stop": "int"},
    "AdapterEntry": {
        "name": "str",
        "rank": "int",
        "target_modules": "tuple[str, ...]",
        "sha256": "str",
    },
    "RouterEntry": {
        "architecture": "str",
        "settings": "RouterSettings",
        "selection": "SelectionRule",
    },
    "RouterSettings": {
        "labels": "tuple[str, ...]",
        "prompt_tokens": "int",
        "generated_tokens": "int",
        "temperature": "float",
    },
    "SelectionRule": {
        "select": "SelectRule",
        "p": "float",
        "k": "int",
        "weigh": "WeighRule",
        "min_confidence": "float",
    },
    "FileEntry": {"size": "int", "sha256": "str"},
}


def required_fields(kind: type[Any]) -> dict[str, str]:
    return {f.name: str(f.type) for f in fields(kind) if (kind, f.name) not in OPTIONAL}


def entries(root: Manifest) -> list[Any]:
    """One entry of every kind."""
    slot, router = root.backbone.slots[0], root.router
    assert router is not None
    parts = [root, root.backbone, slot, slot.parts[0], root.adapters[0], router, router.settings]
    return [*parts, router.selection, next(iter(root.files.values()))]


def test_required_fields_change_only_with_the_version(tiny_bundle: Path) -> None:
    kinds = [type(entry) for entry in entries(open_bundle(tiny_bundle).manifest)]
    assert manifest.VERSION == 2
    assert {kind.__name__: required_fields(kind) for kind in kinds} == VERSION_2


def test_only_optional_fields_may_be_missing(tiny_bundle: Path) -> None:
    for entry in entries(open_bundle(tiny_bundle).manifest):
        document = json.loads(json.dumps(asdict(entry)))
        assert parse(type(entry), document, "it") == entry
        for field in fields(entry):
            shorter = {name: value for name, value in document.items() if name != field.name}
            if (type(entry), field.name) in OPTIONAL:
                assert field.default is not MISSING
                assert getattr(parse(type(entry), shorter, "it"), field.name) == field.default
            else:
                with pytest.raises(ValueError, match=rf"^it\.{field.name} is missing$"):
                    parse(type(entry), shorter, "it")


def test_every_entry_refuses_an_unknown_field(tiny_bundle: Path) -> None:
    for entry in entries(open_bundle(tiny_bundle).manifest):
        with pytest.raises(UnknownFieldError, match=r"^it\.extra is unknown$"):
            parse(type(entry), {**json.loads(json.dumps(asdict(entry))), "extra": 1}, "it")


def test_optional_fields_exist() -> None:
    for kind, name in OPTIONAL:
        assert name in {field.name for field in fields(kind)}
