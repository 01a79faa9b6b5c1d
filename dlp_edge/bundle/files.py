"""The files of a bundle's folder: their names, their limits, and which may lie there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dlp_edge.bundle.manifest import Manifest, edition_name
from dlp_edge.bundle.manifest_parser import LARGEST
from dlp_edge.errors import BundleError
from dlp_edge.untrusted.regular_file import check_regular

MANIFEST = "manifest.json"
BACKBONE = "backbone.onnx"
BACKBONE_DATA = "backbone.onnx.data"
ADAPTERS = "adapters.safetensors"
ROUTER = "router.onnx"
ROUTER_HEAD = "router_head.safetensors"
ROUTER_TOKENIZER = "router_tokenizer.json"
TOKENIZER = "tokenizer.json"
REPORT = "report.json"

EDITED = (ADAPTERS, ROUTER_HEAD)  # what adding or removing an adapter writes anew
REQUIRED = (BACKBONE, BACKBONE_DATA, ADAPTERS, TOKENIZER, REPORT)
ROUTER_FILES = (ROUTER, ROUTER_HEAD, ROUTER_TOKENIZER)
MAX_MANIFEST_BYTES = 1 << 20
# Files that are held in memory whole while they are checked; the largest real ones have a third.
MAX_BYTES = {
    BACKBONE: 32 << 20,
    ROUTER: 96 << 20,
    ROUTER_HEAD: 32 << 20,
    ROUTER_TOKENIZER: 16 << 20,
    TOKENIZER: 48 << 20,
    REPORT: 4 << 20,
}
# What may lie beside the files of the manifest and is never opened: a signature, what a killed
# change of an edition left, what file managers leave.
_BESIDE = re.compile(
    r"manifest\.sig|manifest\.json\.next|adapters(\.\d{1,13})?\.safetensors"
    r"|router_head(\.\d{1,13})?\.safetensors|\.DS_Store|Thumbs\.db|desktop\.ini"
)
REEXPORT = "Copy the bundle again or export it again"


def file_name(manifest: Manifest, name: str) -> str:
    """The name under which a bundle of this manifest holds a file, such as ADAPTERS."""
    return edition_name(name, manifest.edition) if name in EDITED else name


def damaged(name: str, what: str) -> BundleError:
    """For a file that is not as the manifest says."""
    return BundleError(f"{name} {what}", REEXPORT)


def unreadable(name: str, error: OSError) -> BundleError:
    """For a file that the system does not let us read."""
    return damaged(name, f"cannot be read ({error.strerror})")


def check_names(manifest: Manifest) -> None:
    """Raises BundleError unless the manifest lists just the files of a bundle, of possible sizes.

    No name can then lead out of the folder, or differ from another by case only.
    """
    wanted = REQUIRED + (ROUTER_FILES if manifest.router else ())
    names = {file_name(manifest, name): name for name in wanted}
    for name in sorted(names.keys() - manifest.files.keys()):
        raise BundleError(f"{MANIFEST} lists no {name}", REEXPORT)
    for name in sorted(manifest.files.keys() - names.keys()):
        raise BundleError(
            f"{MANIFEST} lists {name[:200]!r}, which is no file of a bundle", REEXPORT
        )
    for name, entry in manifest.files.items():
        most = MAX_BYTES.get(names[name], _most_of(manifest, names[name]))
        if entry.size > most:
            raise damaged(name, f"has {entry.size} bytes, {most} at most make sense")


def _most_of(manifest: Manifest, name: str) -> int:
    """The most bytes that the adapters can take by their ranks; for other files no limit."""
    if name != ADAPTERS:
        return LARGEST["file"]
    widths = sum(
        slot.input_size * len(slot.parts) + slot.output_size for slot in manifest.backbone.slots
    )
    ranks = sum(adapter.rank for adapter in manifest.adapters)
    return 4 * widths * ranks + (16 << 20)


def check_file(root: Path, name: str, size: int) -> None:
    """Raises BundleError unless it is a regular file of this size."""
    try:
        found = check_regular(root / name).st_size
    except FileNotFoundError as error:
        raise damaged(name, "is missing") from error
    except OSError as error:
        raise unreadable(name, error) from error
    if found != size:
        raise damaged(name, f"has {found} bytes instead of {size}")


def check_no_others(root: Path, manifest: Manifest) -> None:
    """Raises BundleError for a file that no part of a bundle needs: another program may read it."""
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                known = entry.name in manifest.files or entry.name == MANIFEST
                if not known and not _BESIDE.fullmatch(entry.name):
                    raise BundleError(
                        f"{MANIFEST} does not list {entry.name[:200]!r}, which lies in the bundle",
                        "Remove it, or copy the bundle again",
                    )
    except OSError as error:
        raise damaged(str(root), f"cannot be listed ({error.strerror})") from error
