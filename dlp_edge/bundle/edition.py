"""A new edition of a bundle in place: some files replaced, the others untouched.

The new files get names of their own, then the manifest that lists them replaces the old one in
one step, then the old files go. Killed at any point, the bundle is whole, as the old edition or as
the new one; at worst a file that no manifest lists is left, and the next edition removes it. No
file that a loaded Runtime holds open is touched, and the backbone is not copied. A signature is
of one manifest, so that of the former edition goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dlp_edge.atomic.lock import locked
from dlp_edge.atomic.staging import resource_error, sync_folder, write_file
from dlp_edge.bundle.bundle import Bundle, dump_manifest, open_bundle
from dlp_edge.bundle.files import EDITED, MANIFEST, file_name
from dlp_edge.bundle.manifest import FileEntry, Manifest, edition_name
from dlp_edge.bundle.signing import SIGNATURE
from dlp_edge.errors import BundleError

_NEXT_MANIFEST = f"{MANIFEST}.next"


def write_edition(bundle: Bundle, manifest: Manifest, parts: Mapping[str, bytes]) -> Bundle:
    """Writes the next edition of a bundle and gives it back.

    Args:
        bundle: the edition that the change was made from.
        manifest: what shall be in the new one; its files and its edition are filled in here.
        parts: the new content of every file of EDITED that the bundle has.

    Raises:
        BundleError: the bundle on the disk is no longer the one that the change was made from.
        ResourceError: the disk is full, the folder cannot be written to, or another process is
            changing the bundle; it is as it was before.
    """
    with locked(bundle.folder):
        check_current(bundle)
        edition = bundle.manifest.edition + 1
        new = {edition_name(name, edition): data for name, data in parts.items()}
        old = {file_name(bundle.manifest, name) for name in parts}
        kept = {name: entry for name, entry in bundle.manifest.files.items() if name not in old}
        entries = {
            name: FileEntry(len(data), hashlib.sha256(data).hexdigest())
            for name, data in new.items()
        }
        whole = replace(manifest, files={**kept, **entries}, edition=edition)
        try:
            for name, data in new.items():
                write_file(bundle.folder / name, data)
            write_file(bundle.folder / _NEXT_MANIFEST, dump_manifest(whole).encode())
            sync_folder(bundle.folder)
            (bundle.folder / _NEXT_MANIFEST).replace(bundle.folder / MANIFEST)
        except OSError as error:
            for name in (*new, _NEXT_MANIFEST):
                with contextlib.suppress(OSError):
                    (bundle.folder / name).unlink(missing_ok=True)
            raise resource_error(bundle.folder, error) from error
        sync_folder(bundle.folder)
        with contextlib.suppress(OSError):
            (bundle.folder / SIGNATURE).unlink(missing_ok=True)  # of the former manifest
        _remove_other_editions(bundle.folder, whole)
    return Bundle(bundle.folder, whole)


def check_current(bundle: Bundle) -> None:
    """Raises BundleError unless the bundle on the disk is still the one that was opened."""
    if open_bundle(bundle.folder).manifest != bundle.manifest:
        raise BundleError(
            f"{bundle.folder} was changed after it was loaded", "Load it again, then repeat"
        )


def _remove_other_editions(folder: Path, manifest: Manifest) -> None:
    """Removes the files of former editions, also what a killed process has left."""
    names = "|".join(
        rf"{re.escape(stem)}(\.\d+)?{re.escape(suffix)}"
        for stem, suffix in map(os.path.splitext, EDITED)
    )
    for path in folder.iterdir():
        if re.fullmatch(names, path.name) and path.name not in manifest.files:
            with contextlib.suppress(OSError):
                path.unlink()
