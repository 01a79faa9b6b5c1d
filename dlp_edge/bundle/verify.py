"""Verifies a whole bundle without loading it, and signs verified bundles."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlp_edge.atomic.lock import locked
from dlp_edge.atomic.staging import resource_error, write_file
from dlp_edge.bundle.bundle import Bundle, open_bundle
from dlp_edge.bundle.edition import read_current
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.bundle.signing import SIGNATURE, TrustedKey, read_signature, sign_manifest
from dlp_edge.errors import BundleError, UsageError
from dlp_edge.untrusted.chat_template import ChatTemplate
from dlp_edge.untrusted.regular_file import OnFraction, no_progress


@dataclass(frozen=True)
class Verified:
    """The result of a verification.

    Attributes:
        bytes: total size of the files.
        seconds: duration of the check.
        signature: "good" (valid for the trusted key), "present" (not checked, as no key was
            given) or "none".
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
    on_progress: OnFraction = no_progress,
) -> Verified:
    """Checks everything that loading a bundle would check, and its signature.

    Args:
        on_progress: called with the fraction done.

    Raises:
        BundleError: it is missing, damaged, of an unsupported version, or not signed with the
            key.
    """
    start = time.perf_counter()
    bundle = read_current(folder, lambda bundle: _checked(bundle, on_progress), trusted_key)
    seconds = time.perf_counter() - start
    total = sum(entry.size for entry in bundle.manifest.files.values())
    if trusted_key is not None:
        return Verified(total, seconds, "good")
    has_signature = read_signature(bundle.folder) is not None
    return Verified(total, seconds, "present" if has_signature else "none")


def _checked(bundle: Bundle, on_progress: OnFraction = no_progress) -> Bundle:
    """The bundle itself, once every file of its edition is checked."""
    bundle.check(on_progress)
    _check_template(bundle.manifest)
    return bundle


def _check_template(manifest: Manifest) -> None:
    try:
        ChatTemplate(manifest.chat_template).render([{"role": "user", "content": "Hello"}])
    except UsageError as error:  # no exported template refuses this message
        raise BundleError(error.cause, "Export the bundle again, with another template") from error


def sign_bundle(folder: Path, key: Path) -> None:
    """Verifies a bundle and signs it with a private key, replacing any signature it had.

    Raises:
        BundleError: as for `verify_bundle`; a damaged bundle is not signed.
        UsageError: the file holds no Ed25519 private key.
        ResourceError: the signature cannot be written, or the bundle is being changed.
    """
    with locked(folder):
        bundle = open_bundle(folder)
        _checked(bundle)
        signature = sign_manifest(bundle.manifest_bytes, key)  # what was verified, nothing newer
        try:
            write_file(folder / SIGNATURE, signature)
        except OSError as error:
            raise resource_error(folder, error) from error
