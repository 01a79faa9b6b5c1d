"""Changing a good bundle so that its manifest still vouches for it: sizes, hashes, checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlp_edge.bundle.bundle import _checksum

Document = dict[str, Any]
Attack = Callable[[Path], None]


def manifest_of(folder: Path) -> Document:
    """The manifest without its checksum."""
    document: Document = json.loads((folder / "manifest.json").read_text())
    del document["checksum"]
    return document


def write_manifest(folder: Path, document: Document) -> None:
    """Writes a manifest with the checksum that it should have."""
    content = {key: value for key, value in document.items() if key not in ("format", "version")}
    text = json.dumps({**document, "checksum": _checksum(content)})
    (folder / "manifest.json").write_text(text)


def edited(change: Callable[[Document], object]) -> Attack:
    """Changes the manifest."""

    def attack(folder: Path) -> None:
        document = manifest_of(folder)
        change(document)
        write_manifest(folder, document)

    return attack


def replaced(name: str, content: Callable[[bytes], bytes]) -> Attack:
    """Changes a file, and its size and hash in the manifest."""

    def attack(folder: Path) -> None:
        data = content((folder / name).read_bytes())
        (folder / name).write_bytes(data)
        vouch(folder, name, data)

    return attack


def vouch(folder: Path, name: str, data: bytes) -> None:
    """Gives the manifest the size and hash of these bytes."""
    document = manifest_of(folder)
    digest = hashlib.sha256(data).hexdigest()
    document["files"][name] = {"size": len(data), "sha256": digest}
    write_manifest(folder, document)
