"""Reads and validates bundles: every byte of a bundle is checked here.

A bundle's author is not trusted. Each format has its own module of checks (`manifest_parser`,
`safetensors_header`, `graph_allowlist`, `tokenizer_file`); this module applies them in order.
What is checked is what is used: a file is opened and read once, and that one read is measured,
hashed, checked and returned.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dlp_edge.bundle import adapter_stack, manifest_parser
from dlp_edge.bundle.files import (
    ADAPTERS,
    BACKBONE,
    BACKBONE_DATA,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    REEXPORT,
    REPORT,
    ROUTER_TOKENIZER,
    TOKENIZER,
    UPDATE,
    check_file,
    check_names,
    check_no_others,
    damaged,
    file_name,
    not_a_bundle,
    unreadable,
)
from dlp_edge.bundle.graph_allowlist import check_backbone
from dlp_edge.bundle.manifest import FORMAT, VERSION, Manifest
from dlp_edge.bundle.routed_folder import RoutedFolder
from dlp_edge.bundle.signing import TrustedKey, read_signature
from dlp_edge.bundle.weight_file import Weights, read_weights
from dlp_edge.errors import BundleError
from dlp_edge.onnx_bytes.reader import Graph
from dlp_edge.untrusted.chat_template import ChatTemplate
from dlp_edge.untrusted.regular_file import (
    OnFraction,
    no_progress,
    open_regular,
    read_at_most,
)
from dlp_edge.untrusted.strict_json import parse


@dataclass(frozen=True)
class Bundle(RoutedFolder):
    """A bundle with a valid manifest, from `manifest_bytes`, and a complete set of files.

    The methods below read the files and check what they return.
    """

    folder: Path
    manifest: Manifest
    manifest_bytes: bytes = field(default=b"", repr=False, compare=False)

    def graph(self) -> tuple[bytes, Graph]:
        """Returns the backbone's graph: the bytes for onnxruntime, and the graph as checked."""
        data = self.read(BACKBONE)
        size = self.manifest.files[BACKBONE_DATA].size
        rank = sum(adapter.rank for adapter in self.manifest.adapters)
        try:
            return data, check_backbone(data, self.manifest.backbone, BACKBONE_DATA, size, rank)
        except ValueError as error:
            raise damaged(BACKBONE, f"is not a valid backbone graph: {error}") from error

    def weights(self, graph: Graph, on_progress: OnFraction = no_progress) -> Weights:
        """Returns the backbone's weights by name, for a graph returned by `graph`.

        Raises:
            BundleError: as `read`.
            MemoryError: they do not fit in memory.
        """
        try:
            with open_regular(self.path(BACKBONE_DATA)) as file:
                size = self.manifest.files[BACKBONE_DATA].size
                weights, bytes_read, digest = read_weights(
                    file, size, graph.tensors.values(), on_progress
                )
        except OSError as error:
            raise unreadable(BACKBONE_DATA, error) from error
        self._compare(BACKBONE_DATA, bytes_read, digest)
        return weights

    def adapters(self) -> adapter_stack.AdapterStack:
        """Returns the stacked adapters, checked against the manifest."""
        loaded = adapter_stack.from_bytes(self.read(file_name(self.manifest, ADAPTERS)))
        try:
            adapter_stack.check(loaded, self.manifest)
        except ValueError as error:
            raise damaged(ADAPTERS, str(error)) from error
        return loaded

    def report(self) -> dict[str, Any]:
        """Returns the measurements made by the export.

        Raises:
            BundleError: the file is damaged.
        """
        try:
            content = parse(self.read(REPORT))
        except ValueError as error:
            raise damaged(REPORT, f"is not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise damaged(REPORT, "is not a JSON object")
        return content

    def check(self, on_progress: OnFraction = no_progress) -> None:
        """Checks every file, in the order of loading, and keeps nothing in memory.

        Args:
            on_progress: called with the fraction done.

        Raises:
            BundleError: a file is invalid.
        """
        self.adapters()
        self.graph()
        ChatTemplate(self.manifest.chat_template)
        if self.manifest.router is not None:
            self.router()
            self.tokenizer(ROUTER_TOKENIZER)
            if self.manifest.router.splitter:
                self.splitter()
        self.tokenizer(TOKENIZER)
        self.report()
        self.verify(BACKBONE_DATA, on_progress)


def open_bundle(folder: str | Path, trusted_key: TrustedKey | None = None) -> Bundle:
    """Reads the manifest and checks that exactly the listed files exist, with the listed sizes.

    Args:
        trusted_key: the key the manifest must be signed with; checked before parsing.

    Raises:
        BundleError: there is no bundle, it is not signed with the key, its format version is not
            supported, or a field or file is invalid.
    """
    root = Path(folder)
    try:
        is_folder = root.is_dir()
    except (OSError, ValueError):  # a path the system does not allow
        is_folder = False
    if not is_folder or not os.path.lexists(root / MANIFEST):
        raise not_a_bundle(root, is_folder)
    try:
        data = read_at_most(root / MANIFEST, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise unreadable(MANIFEST, error) from error
    if trusted_key is not None:
        trusted_key.check(data, read_signature(root))
    try:
        document = parse(data)
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is not valid JSON ({error})", REEXPORT) from error
    manifest = parse_manifest(document)
    for name, entry in manifest.files.items():
        check_file(root, name, entry.size)
    check_no_others(root, manifest)
    return Bundle(root.absolute(), manifest, data)  # whose files are found after a chdir


def parse_manifest(document: Any) -> Manifest:
    """Parses a manifest from its JSON document.

    Raises:
        BundleError: wrong format or version, unknown, missing or mistyped fields.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(f"{MANIFEST} is not a dlp-edge bundle manifest", "Check the path")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise BundleError(
            f"the bundle has format version {str(document.get('version'))[:40]!r}, this dlp-edge "
            f"reads version {VERSION}",
            UPDATE,
        )
    content = {key: value for key, value in document.items() if key not in ("format", "version")}
    if content.pop("checksum", None) != _checksum(content):
        raise BundleError(f"{MANIFEST} has been changed since the export", REEXPORT)
    try:
        manifest = manifest_parser.parse(Manifest, content, "manifest")
        manifest_parser.check(manifest)
    except manifest_parser.UnknownFieldError as error:
        raise BundleError(f"{MANIFEST}: {error}", UPDATE) from error
    except ValueError as error:
        raise BundleError(f"{MANIFEST}: {error}", REEXPORT) from error
    check_names(manifest)
    return manifest


def dump_manifest(manifest: Manifest) -> str:
    """Serializes a manifest as the text of `manifest.json`."""
    content = json.loads(json.dumps(asdict(manifest)))
    document = {"format": FORMAT, "version": VERSION, "checksum": _checksum(content), **content}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON. Detects accidental damage, not forgery."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
