"""Updates a bundle in place: replaces some files and leaves the others untouched.

The new files are written under new names, the manifest that lists them replaces the old one
atomically, and then the old files are removed. A process killed at any point leaves a valid
bundle: the old edition or the new one. At worst an unlisted file remains, which the next edition
removes. Files that a loaded Runtime holds open are never touched, and the backbone is not copied.
A signature covers one manifest, so the previous edition's signature is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from dlp_edge.atomic.lock import locked
from dlp_edge.atomic.sharing import move
from dlp_edge.atomic.staging import resource_error, sync_folder, write_file
from dlp_edge.bundle.bundle import Bundle, dump_manifest, open_bundle
from dlp_edge.bundle.files import EDITED, MANIFEST, MAX_MANIFEST_BYTES, file_name
from dlp_edge.bundle.manifest import FileEntry, Manifest, edition_name
from dlp_edge.bundle.signing import SIGNATURE, TrustedKey
from dlp_edge.errors import BundleError, BusyError
from dlp_edge.untrusted.regular_file import read_at_most

ATTEMPTS = 8  # to read one edition whole
T = TypeVar("T")
_log = logging.getLogger(__name__)

_NEXT_MANIFEST = f"{MANIFEST}.next"


def write_edition(bundle: Bundle, manifest: Manifest, parts: Mapping[str, bytes]) -> Bundle:
    """Writes the next edition of a bundle and returns it.

    Args:
        bundle: the edition that the change is based on.
        manifest: the new manifest; `files` and `edition` are filled in here.
        parts: new content for every file of EDITED that the bundle has.

    Raises:
        BundleError: the bundle on disk has changed since it was opened.
        ResourceError: the disk is full, the folder is not writable, or another process is
            changing the bundle. The bundle is unchanged.
    """
    with locked(bundle.folder):
        check_current(bundle)
        edition = bundle.manifest.edition + 1
        new = {edition_name(name, edition): data for name, data in parts.items()}
        old = {file_name(bundle.manifest, name) for name in parts}
        unchanged = {
            name: entry for name, entry in bundle.manifest.files.items() if name not in old
        }
        entries = {
            name: FileEntry(len(data), hashlib.sha256(data).hexdigest())
            for name, data in new.items()
        }
        updated = replace(manifest, files={**unchanged, **entries}, edition=edition)
        try:
            for name, data in new.items():
                write_file(bundle.folder / name, data)
            write_file(bundle.folder / _NEXT_MANIFEST, dump_manifest(updated).encode())
            sync_folder(bundle.folder)
            move(bundle.folder / _NEXT_MANIFEST, bundle.folder / MANIFEST)
        except OSError as error:
            for name in (*new, _NEXT_MANIFEST):
                with contextlib.suppress(OSError):
                    (bundle.folder / name).unlink(missing_ok=True)
            raise resource_error(bundle.folder, error) from error
        sync_folder(bundle.folder)
        with contextlib.suppress(OSError):
            (bundle.folder / SIGNATURE).unlink(missing_ok=True)  # it signed the old manifest
        _remove_other_editions(bundle.folder, updated)
    _log.info("wrote edition %d of %s", edition, bundle.folder)
    return Bundle(bundle.folder, updated)


def read_current(
    folder: str | Path, read: Callable[[Bundle], T], trusted_key: TrustedKey | None = None
) -> T:
    """Opens a bundle and reads from it; again where another process changed it meanwhile.

    Args:
        read: reads what it needs, all of one edition.

    Raises:
        BundleError: as `open_bundle`, or `read` raised it.
        BusyError: it was changed in every one of ATTEMPTS attempts.
    """
    for _ in range(ATTEMPTS):
        before = _manifest_bytes(folder)
        try:
            return read(open_bundle(folder, trusted_key))
        except BundleError:
            if _manifest_bytes(folder) == before:
                raise
            _log.info("%s was changed while it was read; reading it again", folder)
    raise BusyError(f"another process keeps changing {folder}", "Try again when it has finished")


def _manifest_bytes(folder: str | Path) -> bytes | None:
    """The manifest as it is now; None where it cannot be read."""
    try:
        return read_at_most(Path(folder) / MANIFEST, MAX_MANIFEST_BYTES)
    except (OSError, ValueError):
        return None


def check_current(bundle: Bundle) -> None:
    """Raises BundleError if the bundle on disk has changed since it was opened."""
    if open_bundle(bundle.folder).manifest != bundle.manifest:
        raise BundleError(
            f"{bundle.folder} was changed after it was loaded", "Load it again, then repeat"
        )


def _remove_other_editions(folder: Path, manifest: Manifest) -> None:
    """Removes the files of other editions, including those left by a killed process."""
    names = "|".join(
        rf"{re.escape(stem)}(\.\d+)?{re.escape(suffix)}"
        for stem, suffix in map(os.path.splitext, EDITED)
    )
    for path in folder.iterdir():
        if re.fullmatch(names, path.name) and path.name not in manifest.files:
            with contextlib.suppress(OSError):
                path.unlink()
