"""Bundle signatures: Ed25519 over the bytes of the manifest.

The manifest holds the SHA-256 of every other file, so signing it signs the bundle. Hashes alone
prove no origin: whoever changes a file can update its hash. The signature is a file of 64 raw
bytes, so `openssl pkeyutl -verify -rawin` can check it too; keys are PEM files as openssl writes
them. Needs the extra `sign` (the `cryptography` package).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dlp_edge.errors import BundleError, ResourceError, UsageError
from dlp_edge.untrusted.regular_file import read_at_most

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE = "manifest.sig"
SIGNATURE_BYTES = 64
MAX_KEY_BYTES = 64 << 10
_RAW_KEY_BYTES = 32
_MAKE_ONE = "Make one with dlp-edge sign --new-key FILE, or openssl genpkey -algorithm ed25519"


class TrustedKey:
    """A public key that bundles must be signed with.

    Args:
        key: a PEM file, its content, or the 32 raw bytes.

    Raises:
        UsageError: it is not an Ed25519 public key, cannot be read, or `cryptography` is missing.
    """

    def __init__(self, key: str | os.PathLike[str] | bytes) -> None:
        if not isinstance(key, (str, os.PathLike, bytes)):
            raise UsageError(f"the trusted key is a {type(key).__name__}", "Give a path or bytes")
        self._key = _parse_public(key if isinstance(key, bytes) else _read(Path(key)))

    def check(self, manifest: bytes, signature: bytes | None) -> None:
        """Checks the manifest's bytes. The caller must parse these same bytes.

        Raises:
            BundleError: the signature is missing, or is not valid for this key and these bytes.
        """
        from cryptography.exceptions import InvalidSignature

        if signature is None:
            raise BundleError("the bundle is not signed", "Get a signed bundle from its publisher")
        try:
            self._key.verify(signature, manifest)
        except InvalidSignature as error:
            raise BundleError(
                f"{SIGNATURE} is not a valid signature of this manifest with the trusted key",
                "Get the bundle again from its publisher, or check that the key is theirs",
            ) from error


def read_signature(folder: Path) -> bytes | None:
    """Returns a bundle's signature; None if it is missing or unreadable."""
    try:
        return read_at_most(folder / SIGNATURE, SIGNATURE_BYTES)
    except OSError:
        return None


def sign_manifest(manifest: bytes, key: Path) -> bytes:
    """Signs a manifest's bytes with a private key.

    Raises:
        UsageError: the file holds no Ed25519 private key.
    """
    return _parse_private(_read(key)).sign(manifest)


def write_new_key(path: Path) -> Path:
    """Writes a new private key to `path` (readable by its owner only), and its public key.

    Returns:
        The public key's path, `<path>.pub`.

    Raises:
        UsageError: one of the files exists; a key is never overwritten.
        ResourceError: a file cannot be written.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    private_pem = private.private_bytes(
        forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption()
    )
    public = private.public_key().public_bytes(
        forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo
    )
    public_path = path.with_name(f"{path.name}.pub")
    if public_path.exists():
        raise _exists(public_path)
    _write_new(path, private_pem, 0o600)
    _write_new(public_path, public, 0o644)
    return public_path


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:  # noqa: PTH123
            file.write(data)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written ({error.strerror})", "Choose another place"
        ) from error


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists", "Choose another name; a key is never overwritten")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"the key {path} cannot be read ({error})", _MAKE_ONE) from error
    if len(data) > MAX_KEY_BYTES:
        raise UsageError(f"{path} is too large for a key", _MAKE_ONE)
    return data


def _parse_public(data: bytes) -> Ed25519PublicKey:
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if len(data) == _RAW_KEY_BYTES:
        return Ed25519PublicKey.from_public_bytes(data)
    if b"PRIVATE KEY" in data:
        raise UsageError("the trusted key is a private one", "Give the public key (FILE.pub)")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError("the trusted key is not a PEM public key", _MAKE_ONE) from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError("the trusted key is not an Ed25519 key", _MAKE_ONE)
    return key


def _parse_private(data: bytes) -> Ed25519PrivateKey:
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:  # raised for a key with a passphrase
        raise UsageError(
            "the private key has a passphrase", "Remove it: openssl pkey -in KEY -out PLAIN"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError("the key is not a PEM private key", _MAKE_ONE) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError("the private key is not an Ed25519 key", _MAKE_ONE)
    return key


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "signatures need the package cryptography", 'Run pip install "dlp-edge[sign]"'
        ) from error
