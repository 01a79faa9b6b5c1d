"""Reading a bundle: every way in which it can be wrong is a BundleError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Runtime
from dlp_edge.bundle.bundle import _checksum, dump_manifest, open_bundle, parse_manifest
from dlp_edge.errors import BundleError


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and makes its checksum right again."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    del document["checksum"]
    change(document)
    content = {key: value for key, value in document.items() if key not in ("format", "version")}
    path.write_text(json.dumps({**document, "checksum": _checksum(content)}))


def test_manifest_round_trip(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    assert parse_manifest(json.loads(dump_manifest(manifest))) == manifest


def test_a_router_of_an_earlier_release_reads_both_ends_of_a_prompt(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda m: m["router"]["settings"].pop("spread"))
    router = open_bundle(bundle_copy).manifest.router
    assert router is not None
    assert not router.settings.spread


MANIFEST_DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda m: m.update(format="zip"),
    "another version": lambda m: m.update(version=99),
    "version of another type": lambda m: m.update(version=True),
    "no weights listed": lambda m: m["files"].pop("backbone.onnx.data"),
    "unknown field": lambda m: m.update(extra=1),
    "missing field": lambda m: m.pop("target"),
    "wrong type": lambda m: m.update(target=3),
    "unknown rule": lambda m: m["router"]["selection"].update(select="best"),
    "rule out of range": lambda m: m["router"]["selection"].update(p=2.0),
    "list for object": lambda m: m.update(files=[]),
    "object for list": lambda m: m.update(adapters={}),
    "file outside": lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}}),
    "file not listed": lambda m: m["files"].pop("backbone.onnx"),
    "router not listed": lambda m: m["files"].pop("router.onnx"),
    "label of no adapter": lambda m: m["adapters"].pop(),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGES)
def test_damaged_manifests_are_refused(bundle_copy: Path, damage: str) -> None:
    edit(bundle_copy, MANIFEST_DAMAGES[damage])
    with pytest.raises(BundleError):
        open_bundle(bundle_copy)


def test_an_edited_manifest_is_found(bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    path.write_text(path.read_text().replace("<|assistant|>", "<|assistent|>"))
    with pytest.raises(BundleError, match="changed since the export"):
        open_bundle(bundle_copy)


GRAPH_DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "slot": lambda b: b["slots"][0].update(name="other"),
    "layers": lambda b: b.update(num_layers=3),
    "head size": lambda b: b.update(head_size=8),
    "vocabulary": lambda b: b.update(vocab_size=3),
    "type": lambda b: b.update(dtype="foo"),
}


@pytest.mark.parametrize("damage", GRAPH_DAMAGES)
def test_a_manifest_of_another_graph_is_refused(bundle_copy: Path, damage: str) -> None:
    edit(bundle_copy, lambda m: GRAPH_DAMAGES[damage](m["backbone"]))
    with pytest.raises(BundleError):
        Runtime(bundle_copy).generate("Hello", adapters={})


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'"text"', b"\xff\xfe"])
def test_manifests_that_are_no_json_are_refused(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("part", ["manifest", "backbone"])
def test_an_unknown_field_may_be_of_a_later_release(bundle_copy: Path, part: str) -> None:
    edit(bundle_copy, lambda m: (m if part == "manifest" else m[part]).update(later=1))
    with pytest.raises(BundleError, match=r"later is unknown") as raised:
        open_bundle(bundle_copy)
    assert raised.value.remedy == "Update dlp-edge, or export the bundle again"


def test_a_missing_field_means_a_damaged_bundle(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda m: m["backbone"].pop("dtype"))
    with pytest.raises(BundleError, match=r"backbone\.dtype is missing") as raised:
        open_bundle(bundle_copy)
    assert "Update" not in raised.value.remedy


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no manifest"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="no bundle"):
        open_bundle(tmp_path / "missing")


FILES = [
    "backbone.onnx",
    "backbone.onnx.data",
    "adapters.safetensors",
    "router.onnx",
    "router_tokenizer.json",
    "tokenizer.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        Runtime(bundle_copy)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(bundle_copy: Path, name: str) -> None:
    path = bundle_copy / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=name):
        Runtime(bundle_copy)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(bundle_copy: Path, name: str) -> None:
    path = bundle_copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=name):
        Runtime(bundle_copy)


def test_a_link_is_refused(bundle_copy: Path) -> None:
    path = bundle_copy / "tokenizer.json"
    elsewhere = bundle_copy.parent / "elsewhere.json"
    path.rename(elsewhere)
    try:
        path.symlink_to(elsewhere)
    except OSError:
        pytest.skip("this user may not create links here")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Runtime(bundle_copy)
