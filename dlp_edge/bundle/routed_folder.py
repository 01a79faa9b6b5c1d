"""What a bundle and a router folder share: files that a manifest lists, and a router among them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from dlp_edge.bundle.files import (
    MANIFEST,
    REEXPORT,
    ROUTER,
    ROUTER_HEAD,
    SPLITTER,
    TOKENIZER,
    damaged,
    unreadable,
)
from dlp_edge.bundle.graph_allowlist import CheckLength, check_router, check_splitter
from dlp_edge.bundle.manifest import (
    AdapterEntry,
    FileEntry,
    RouterEntry,
    TextBackbone,
    edition_name,
)
from dlp_edge.bundle.router_head import RouterHead, head_from_bytes
from dlp_edge.errors import BundleError, RouterError
from dlp_edge.untrusted.regular_file import OnFraction, hash_at_most, no_progress, open_regular
from dlp_edge.untrusted.tokenizer_file import load_tokenizer


class RoutedManifest(Protocol):
    """What routing needs to know of a manifest."""

    @property
    def backbone(self) -> TextBackbone: ...
    @property
    def adapters(self) -> tuple[AdapterEntry, ...]: ...
    @property
    def router(self) -> RouterEntry | None: ...
    @property
    def files(self) -> Mapping[str, FileEntry]: ...
    @property
    def edition(self) -> int: ...


class RoutedFolder:
    """Reads the files of a folder, each once, and checks what it returns."""

    folder: Path
    manifest: RoutedManifest

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> bytes:
        """Returns the bytes of a file, checked against the manifest.

        Raises:
            BundleError: the file's size or SHA-256 differs from the manifest.
        """
        size = self.manifest.files[name].size
        try:
            with open_regular(self.path(name)) as file:
                data = file.read(size + 1)
        except OSError as error:
            raise unreadable(name, error) from error
        self._compare(name, len(data), hashlib.sha256(data).hexdigest())
        return data

    def verify(self, name: str, on_progress: OnFraction = no_progress) -> None:
        """Checks a file's size and SHA-256 without keeping it in memory.

        Args:
            on_progress: called with the fraction done.

        Raises:
            BundleError: as `read`.
        """
        try:
            with open_regular(self.path(name)) as file:
                size, digest = hash_at_most(file, self.manifest.files[name].size, on_progress)
        except OSError as error:
            raise unreadable(name, error) from error
        self._compare(name, size, digest)

    def router_head(self) -> RouterHead:
        """Returns the router's last layer. Only for a bundle with a router.

        Raises:
            BundleError: the file is damaged, or has fewer rows than the router has labels.
        """
        try:
            head = head_from_bytes(self.read(edition_name(ROUTER_HEAD, self.manifest.edition)))
        except RouterError as error:
            raise BundleError(error.cause, REEXPORT) from error
        entry = self.manifest.router
        if entry is not None and len(head.bias) < len(entry.settings.labels):
            raise damaged(ROUTER_HEAD, "has fewer rows than the router has labels")
        return head

    def router(self) -> tuple[bytes, RouterHead, CheckLength]:
        """Returns the router's graph, last layer and check of lengths. Only with a router.

        Raises:
            BundleError: one of them is damaged, or their sizes differ.
        """
        entry = self.manifest.router
        if entry is None:
            raise damaged(MANIFEST, "describes no router")
        data, head = self.read(ROUTER), self.router_head()
        try:
            width, check_length = check_router(data, entry)
        except ValueError as error:
            raise damaged(ROUTER, f"is not a valid router graph: {error}") from error
        if width != head.weight.shape[1]:
            raise damaged(
                ROUTER, f"has {width} features, its last layer expects {head.weight.shape[1]}"
            )
        return data, head, check_length

    def splitter(self) -> bytes:
        """Returns the request splitter's graph. Only for a bundle with one.

        Raises:
            BundleError: it is damaged.
        """
        data = self.read(SPLITTER)
        try:
            check_splitter(data)
        except ValueError as error:
            raise damaged(SPLITTER, f"is not a valid request splitter: {error}") from error
        return data

    def tokenizer(self, name: str) -> Tokenizer:
        """Returns the tokenizer in TOKENIZER or ROUTER_TOKENIZER.

        Raises:
            BundleError: the file is not a valid tokenizer, or exceeds the limits on one.
        """
        size = self.manifest.backbone.vocab_size if name == TOKENIZER else None
        try:
            return load_tokenizer(self.read(name), size)
        except ValueError as error:
            raise damaged(name, f"is not a valid tokenizer ({error})") from error

    def _compare(self, name: str, size: int, digest: str) -> None:
        entry = self.manifest.files[name]
        if size != entry.size:
            raise damaged(name, f"is not {entry.size} bytes long")
        if digest != entry.sha256:
            raise damaged(name, "has been changed since the export")
