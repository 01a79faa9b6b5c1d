"""Fetches a bundle file by file: resumable, checked by its manifest, and put in place whole."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from dlp_edge.atomic.cache import cache_folder
from dlp_edge.atomic.lock import locked
from dlp_edge.atomic.staging import (
    check_space,
    check_target,
    replace_folder,
    resource_error,
    restore_folder,
)
from dlp_edge.bundle.bundle import parse_manifest
from dlp_edge.bundle.files import MANIFEST, MAX_MANIFEST_BYTES, REEXPORT
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.bundle.signing import SIGNATURE, SIGNATURE_BYTES
from dlp_edge.errors import BundleError, ResourceError, UsageError
from dlp_edge.hub.origins import HubRepository, Origin, WebFolder
from dlp_edge.untrusted.regular_file import read_at_most, sha256_of
from dlp_edge.untrusted.strict_json import parse

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]


def open_origin(source: str, revision: str | None = None) -> Origin:
    """What `source` names: a hub id such as `user/bundle`, or the URL of a bundle's folder.

    Raises:
        UsageError: it is neither.
    """
    if source.startswith(("https://", "http://")):
        if revision is not None:
            raise UsageError("a URL has no revisions", "Leave it out")
        return WebFolder(source)
    if HUB_ID.fullmatch(source):
        return HubRepository(source, revision)
    raise UsageError(
        f"{source!r} is neither a hub id nor a URL", "Write user/bundle, or https://..."
    )


def cached_bundle(
    source: str, revision: str | None = None, on_progress: Progress = lambda stage, fraction: None
) -> Path:
    """The bundle in the user's cache, fetched or brought up to date; as it is there if the origin
    cannot be reached.

    Raises:
        UsageError, BundleError, ResourceError: see `fetch_bundle`.
    """
    name = re.sub(r"[^\w.-]+", "--", source if revision is None else f"{source}@{revision}")
    out = cache_folder() / "hub" / name
    out.parent.mkdir(exist_ok=True)
    try:
        fetch_bundle(source, out, revision, on_progress)
    except ResourceError as error:
        if not (out / MANIFEST).is_file():
            raise
        _log.warning("%s: the copy in the cache is used (%s)", source, error.cause)
    return out


def fetch_bundle(
    source: str,
    out: Path,
    revision: str | None = None,
    on_progress: Progress = lambda stage, fraction: None,
) -> Manifest:
    """Fetches a bundle into a folder, which is whole or not there.

    An interrupted download resumes. A folder that holds the same bundle is left alone, and another
    bundle is replaced at the end.

    Args:
        source: a hub id or a URL; see `open_origin`.
        revision: a branch, tag or commit of the hub's repository.
        on_progress: called with (file, fraction of all bytes).

    Raises:
        UsageError: the source is neither, or `out` exists and is no bundle.
        BundleError: there is no bundle, or a file differs from its manifest.
        ResourceError: the origin cannot be reached, or the disk is full.
    """
    origin = open_origin(source, revision)
    out = out.absolute()
    check_target(out, _is_bundle)
    part = out.with_name(f".{out.name}.part")
    with locked(out):
        try:
            restore_folder(out)
            part.mkdir(exist_ok=True)
            (part / MANIFEST).unlink(missing_ok=True)
            if not origin.fetch(MANIFEST, part / MANIFEST, MAX_MANIFEST_BYTES, lambda size: None):
                raise BundleError(f"{source} has no {MANIFEST}", "Check the name of the bundle")
            data = read_at_most(part / MANIFEST, MAX_MANIFEST_BYTES)
            manifest = _parse(data)
            if _is_bundle(out) and (out / MANIFEST).read_bytes() == data:
                shutil.rmtree(part)
                return manifest
            _fetch_files(origin, manifest, part, on_progress)
            origin.fetch(SIGNATURE, part / SIGNATURE, SIGNATURE_BYTES, lambda size: None)
            shutil.rmtree(part / ".cache", ignore_errors=True)  # of huggingface_hub
            replace_folder(part, out)
        except OSError as error:
            raise resource_error(out, error) from error
    on_progress("done", 1.0)
    return manifest


def _fetch_files(origin: Origin, manifest: Manifest, part: Path, on_progress: Progress) -> None:
    """Fetches what is missing, and checks each file."""
    total = sum(entry.size for entry in manifest.files.values())
    check_space(part, total)
    done = 0
    for name, entry in sorted(manifest.files.items()):

        def tell(size: int, name: str = name, done: int = done) -> None:
            on_progress(name, min(1.0, (done + size) / total))

        tell(0)
        path = part / name
        if not _matches(path, entry.size, entry.sha256):
            if not origin.fetch(name, path, entry.size, tell):
                raise BundleError(f"{name} is missing where the bundle is fetched from", REEXPORT)
            if not _matches(path, entry.size, entry.sha256):
                path.unlink(missing_ok=True)
                raise BundleError(
                    f"{name} was fetched, but is not the file that {MANIFEST} describes",
                    "Fetch it again",
                )
        done += entry.size


def _matches(path: Path, size: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == size and sha256_of(path) == sha256


def _parse(data: bytes) -> Manifest:
    try:
        return parse_manifest(parse(data))
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is not valid JSON ({error})", REEXPORT) from error


def _is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()
