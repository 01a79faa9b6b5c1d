"""A bundle whose files are exchanged after `verify` and while it is loaded: the bytes that were
checked are the bytes that are used, or there is a typed error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Runtime
from dlp_edge.bundle import bundle, routed_folder
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.errors import BundleError

pytestmark = pytest.mark.slow

NAMES = (
    "manifest.json", "adapters.safetensors", "backbone.onnx", "backbone.onnx.data",
    "router.onnx", "router_head.safetensors", "router_tokenizer.json", "tokenizer.json",
)  # fmt: skip


def _flipped(path: Path) -> bytes:
    """The file with a bit in the middle the other way round; its size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


def _replace(path: Path, data: bytes) -> None:
    other = path.with_name("." + path.name)
    other.write_bytes(data)
    other.replace(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["bytes", "another file", "a link", "nothing"])
def test_after_verify(bundle_copy: Path, tmp_path: Path, name: str, how: str) -> None:
    verify_bundle(bundle_copy)
    path, bad = bundle_copy / name, _flipped(bundle_copy / name)
    if how == "bytes":
        path.write_bytes(bad)
    elif how == "another file":
        _replace(path, bad)
    else:
        path.rename(tmp_path / "elsewhere")
    if how == "a link":
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError):
        Runtime(bundle_copy)


@pytest.mark.parametrize("name", NAMES[1:])
def test_while_loading(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every file but one is exchanged as soon as the manifest is read; that one, right after it was
    read itself. Only what was read before it changed is used."""
    with Runtime(bundle_copy, threads=1) as runtime:
        expected = runtime.generate("Count 3", max_new_tokens=8).text
    opened: list[str] = []
    read = routed_folder.open_regular

    def reading(path: Path) -> Any:
        file = read(path)
        opened.append(path.name)
        if path.name == name:  # exchanged between opening and reading
            _replace(path, _flipped(path))
        return file

    for module in (bundle, routed_folder):
        monkeypatch.setattr(module, "open_regular", reading)
    with Runtime(bundle_copy, threads=1) as runtime:
        assert opened.count(name) == 1
        assert runtime.generate("Count 3", max_new_tokens=8).text == expected
    monkeypatch.undo()
    with pytest.raises(BundleError):
        verify_bundle(bundle_copy)


@pytest.mark.parametrize("change", ["written", "cut"])
def test_the_opened_file_itself_is_changed(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """In place, before it is read: what is read is hashed, and refused."""
    read = routed_folder.open_regular

    def reading(path: Path) -> Any:
        file = read(path)
        if path.name == "tokenizer.json":
            data = _flipped(path)
            path.write_bytes(data if change == "written" else data[:100])
        return file

    for module in (bundle, routed_folder):
        monkeypatch.setattr(module, "open_regular", reading)
    with pytest.raises(BundleError):
        Runtime(bundle_copy, threads=1)


def test_the_manifest_of_another_bundle(bundle_copy: Path, tmp_path: Path) -> None:
    """Two good bundles, exchanged as folders after the manifest of one was read."""
    other = Path(shutil.copytree(bundle_copy, tmp_path / "other"))
    _replace(other / "tokenizer.json", _flipped(other / "tokenizer.json"))
    opened = open_bundle(bundle_copy)
    bundle_copy.rename(tmp_path / "first")
    other.rename(bundle_copy)
    checks: list[Callable[[], object]] = [opened.check, lambda: opened.tokenizer("tokenizer.json")]
    for check in checks:
        with pytest.raises(BundleError):
            check()
