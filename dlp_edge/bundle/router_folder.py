"""The router folder of an export for another server: the bundle's router files, the backbone's
tokenizer, and `routing.json` instead of a bundle's manifest.

It is read as bundles are: its author is not trusted, and every byte is checked once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dlp_edge.bundle import manifest_parser
from dlp_edge.bundle.files import (
    MAX_BYTES,
    MAX_MANIFEST_BYTES,
    TOKENIZER,
    UPDATE,
    check_file,
    damaged,
    router_files,
    unreadable,
)
from dlp_edge.bundle.manifest import FileEntry, RouterEntry, RouterManifest
from dlp_edge.bundle.routed_folder import RoutedFolder
from dlp_edge.errors import BundleError
from dlp_edge.untrusted.regular_file import read_at_most, sha256_of
from dlp_edge.untrusted.strict_json import parse

ROUTING = "routing.json"
FORMAT = "dlp-edge-routing"
VERSION = 1
_REEXPORT = "Export it again: dlp-edge export --to vllm"


@dataclass(frozen=True)
class RouterFolder(RoutedFolder):
    """A router folder with a valid `routing.json` and a complete set of files."""

    folder: Path
    manifest: RouterManifest = field(repr=False)


def open_router_folder(folder: Path) -> RouterFolder:
    """Reads `routing.json`, and checks that the listed files are there with their sizes.

    Raises:
        BundleError: there is none, its version is not supported, or a field or file is invalid.
    """
    if not (folder / ROUTING).is_file():
        raise BundleError(f"there is no {ROUTING} in {folder}", _REEXPORT)
    try:
        document = parse(read_at_most(folder / ROUTING, MAX_MANIFEST_BYTES))
    except OSError as error:
        raise unreadable(ROUTING, error) from error
    except ValueError as error:
        raise BundleError(f"{ROUTING} is not valid JSON ({error})", _REEXPORT) from error
    manifest = _parsed(document)
    for name, entry in manifest.files.items():
        check_file(folder, name, entry.size)
    return RouterFolder(folder.absolute(), manifest)


def file_entries(folder: Path, router: RouterEntry | None) -> dict[str, FileEntry]:
    """The sizes and hashes of the files that `routing.json` lists."""
    return {
        name: FileEntry((folder / name).stat().st_size, sha256_of(folder / name))
        for name in _names(router)
    }


def dump_routing(manifest: RouterManifest) -> str:
    """The text of `routing.json`."""
    content = json.loads(json.dumps(asdict(manifest)))
    document = {"format": FORMAT, "version": VERSION, **content}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _parsed(document: object) -> RouterManifest:
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise BundleError(f"{ROUTING} is not that of a router folder", "Check the path")
    version = document.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise BundleError(
            f"{ROUTING} has version {str(version)[:40]!r}, this dlp-edge reads {VERSION}", UPDATE
        )
    try:
        manifest = manifest_parser.parse(RouterManifest, document, "routing")
        manifest_parser.check_routing(manifest)
    except manifest_parser.UnknownFieldError as error:
        raise BundleError(f"{ROUTING}: {error}", UPDATE) from error
    except ValueError as error:
        raise BundleError(f"{ROUTING}: {error}", _REEXPORT) from error
    _check_files(manifest)
    if not 1 <= manifest.max_skills <= manifest_parser.LARGEST["adapters"]:
        raise BundleError(f"{ROUTING}: max_skills is {manifest.max_skills}", _REEXPORT)
    if not 1 <= manifest.max_rank <= manifest_parser.LARGEST["rank"]:
        raise BundleError(f"{ROUTING}: max_rank is {manifest.max_rank}", _REEXPORT)
    return manifest


def _check_files(manifest: RouterManifest) -> None:
    """Exactly the known names, which excludes paths, with plausible sizes."""
    wanted = _names(manifest.router)
    if set(wanted) != set(manifest.files):
        raise BundleError(f"{ROUTING} does not list exactly {', '.join(wanted)}", _REEXPORT)
    for name, entry in manifest.files.items():
        if entry.size > MAX_BYTES[name]:
            raise damaged(name, f"has {entry.size} bytes, the limit is {MAX_BYTES[name]}")


def _names(router: RouterEntry | None) -> tuple[str, ...]:
    return (TOKENIZER,) if router is None else (TOKENIZER, *router_files(router))
