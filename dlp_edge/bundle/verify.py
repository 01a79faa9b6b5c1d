"""Checking a whole bundle without loading it, and signing what has been checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlp_edge.atomic.lock import locked
from dlp_edge.atomic.staging import resource_error, write_file
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.files import MANIFEST
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.bundle.signing import SIGNATURE, TrustedKey, read_signature, sign_manifest
from dlp_edge.errors import BundleError, UsageError
from dlp_edge.untrusted.chat_template import ChatTemplate


@dataclass(frozen=True)
class Verified:
    """What was checked.

    Attributes:
        bytes: of all files.
        seconds: it took.
        signature: "good" with the trusted key; "present" but not checked, since no key was
            given; "none".
    """

    bytes: int
    seconds: float
    signature: Literal["good", "present", "none"]

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / max(self.seconds, 1e-9)


def verify_bundle(
    folder: str | Path,
    trusted_key: TrustedKey | None = None,
    tell: Callable[[float], None] = lambda fraction: None,
) -> Verified:
    """Checks everything about a bundle that loading it would check, and its signature.

    Args:
        tell: called with the fraction that is done.

    Raises:
        BundleError: it is missing, damaged, of another version, or not signed with the key.
    """
    begun = time.perf_counter()
    bundle = open_bundle(folder, trusted_key)
    bundle.check(tell)
    _check_template(bundle.manifest)
    seconds = time.perf_counter() - begun
    total = sum(entry.size for entry in bundle.manifest.files.values())
    if trusted_key is not None:
        return Verified(total, seconds, "good")
    there = read_signature(bundle.folder) is not None
    return Verified(total, seconds, "present" if there else "none")


def _check_template(manifest: Manifest) -> None:
    try:
        ChatTemplate(manifest.chat_template).render([{"role": "user", "content": "Hello"}])
    except UsageError as error:  # whatever the template did: exports write none that refuses this
        raise BundleError(error.cause, "Export the bundle again, with another template") from error


def sign_bundle(folder: Path, key: Path) -> None:
    """Checks a bundle and signs it with a private key, in place of any signature it had.

    Raises:
        BundleError: as `verify_bundle`; what is damaged is not signed.
        UsageError: the file holds no such key.
        ResourceError: the signature cannot be written, or the bundle is being changed.
    """
    with locked(folder):
        verify_bundle(folder)
        signature = sign_manifest((folder / MANIFEST).read_bytes(), key)
        try:
            write_file(folder / SIGNATURE, signature)
        except OSError as error:
            raise resource_error(folder, error) from error
