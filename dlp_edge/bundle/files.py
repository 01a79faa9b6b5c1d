"""The files of a bundle: names, size limits, and which files a bundle folder may contain."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dlp_edge.bundle.manifest import Manifest, RouterEntry, edition_name
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
SPLITTER = "request_splitter.onnx"
TOKENIZER = "tokenizer.json"
REPORT = "report.json"

EDITED = (ADAPTERS, ROUTER_HEAD)  # rewritten when an adapter is added or removed
REQUIRED = (BACKBONE, BACKBONE_DATA, ADAPTERS, TOKENIZER, REPORT)
ROUTER_FILES = (ROUTER, ROUTER_HEAD, ROUTER_TOKENIZER)
MAX_MANIFEST_BYTES = 1 << 20
# Files that are held in memory while they are checked. The largest real ones are a third of this.
MAX_BYTES = {
    BACKBONE: 32 << 20,
    ROUTER: 96 << 20,
    ROUTER_HEAD: 32 << 20,
    ROUTER_TOKENIZER: 16 << 20,
    SPLITTER: 48 << 20,
    TOKENIZER: 48 << 20,
    REPORT: 4 << 20,
}
# Unlisted files that are allowed but never opened: a signature, leftovers of an interrupted
# edition change, and file manager metadata.
_BESIDE = re.compile(
    r"manifest\.sig|manifest\.json\.next|adapters(\.\d{1,13})?\.safetensors"
    r"|router_head(\.\d{1,13})?\.safetensors|\.DS_Store|Thumbs\.db|desktop\.ini"
)
REEXPORT = "Copy the bundle again or export it again"
UPDATE = "Update dlp-edge, or export the bundle again"


def file_name(manifest: Manifest, name: str) -> str:
    """Returns the name of a file such as ADAPTERS in the manifest's edition."""
    return edition_name(name, manifest.edition) if name in EDITED else name


def not_a_bundle(root: Path, is_folder: bool) -> BundleError:
    """Returns the error for a path without a manifest, which says what it seems to be."""
    if is_folder and (root / "adapter_config.json").is_file():
        return BundleError(
            f"{root} is a PEFT adapter, not a bundle",
            f"Add it to a bundle: dlp-edge add BUNDLE NAME={root}",
        )
    if is_folder and not (root / "config.json").is_file():
        return BundleError(
            f"{root} has no {MANIFEST}, so it is not a complete bundle", "Export it again"
        )
    if is_folder or root.suffix.lower() == ".gguf":
        return BundleError(
            f"{root} is a backbone, not a bundle",
            f"Make one of it first: dlp-edge export --backbone {root} -o BUNDLE",
        )
    return BundleError(f"there is no bundle at {root}", "Check the path, or run dlp-edge export")


def damaged(name: str, what: str) -> BundleError:
    """Returns the error for a file that does not match the manifest."""
    return BundleError(f"{name} {what}", REEXPORT)


def unreadable(name: str, error: OSError) -> BundleError:
    """Returns the error for a file that the system cannot read."""
    return damaged(name, f"cannot be read ({error.strerror})")


def router_files(router: RouterEntry) -> tuple[str, ...]:
    """Returns the names of a router's files."""
    return ROUTER_FILES + ((SPLITTER,) if router.splitter else ())


def check_names(manifest: Manifest) -> None:
    """Raises BundleError unless the manifest lists exactly a bundle's files, with plausible sizes.

    This also excludes path traversal and names that differ only in case.
    """
    wanted: tuple[str, ...] = REQUIRED
    if manifest.router is not None:
        wanted += router_files(manifest.router)
    names = {file_name(manifest, name): name for name in wanted}
    for name in sorted(names.keys() - manifest.files.keys()):
        raise BundleError(f"{MANIFEST} does not list {name}", REEXPORT)
    for name in sorted(manifest.files.keys() - names.keys()):
        raise BundleError(f"{MANIFEST} lists {name[:200]!r}, which is not a bundle file", REEXPORT)
    for name, entry in manifest.files.items():
        limit = MAX_BYTES.get(names[name], _size_limit(manifest, names[name]))
        if entry.size > limit:
            raise damaged(name, f"has {entry.size} bytes, the limit is {limit}")


def _size_limit(manifest: Manifest, name: str) -> int:
    """Returns the size limit of the adapters, derived from their ranks; LARGEST for other files."""
    if name != ADAPTERS:
        return LARGEST["file"]
    widths = sum(
        slot.input_size * len(slot.parts) + slot.output_size for slot in manifest.backbone.slots
    )
    ranks = sum(adapter.rank for adapter in manifest.adapters)
    return 4 * widths * ranks + (16 << 20)


def check_file(root: Path, name: str, size: int) -> None:
    """Raises BundleError unless the file is a regular file of this size."""
    try:
        actual = check_regular(root / name).st_size
    except FileNotFoundError as error:
        raise damaged(name, "is missing") from error
    except OSError as error:
        raise unreadable(name, error) from error
    if actual != size:
        raise damaged(name, f"has {actual} bytes instead of {size}")


def check_no_others(root: Path, manifest: Manifest) -> None:
    """Raises BundleError for unlisted files, which another program might read and trust."""
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                known = entry.name in manifest.files or entry.name == MANIFEST
                if not known and not _BESIDE.fullmatch(entry.name):
                    raise BundleError(
                        f"the bundle contains {entry.name[:200]!r}, which {MANIFEST} does not list",
                        "Remove it, or copy the bundle again",
                    )
    except OSError as error:
        raise damaged(str(root), f"cannot be listed ({error.strerror})") from error
