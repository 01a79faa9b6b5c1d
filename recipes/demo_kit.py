"""Writes dlp_edge/demo/kit.zip: what the demo needs to make its bundle without torch.

    python recipes/demo_kit.py

The kit is a bundle without what `dlp_edge/demo/assemble.py` computes again, byte for byte: the
weights, from the backbone's GGUF file, and the adapters. Unlike `dlp-edge export`, which rounds
most of a large head to int4 on calibration text, it has the whole head in int8. Make it again when
the export, the demo's adapters or its router change; a test compares the two.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from dlp_edge.bundle import files
from dlp_edge.bundle.bundle import dump_manifest, open_bundle
from dlp_edge.bundle.manifest import FileEntry, Manifest
from dlp_edge.demo.assemble import COMPUTED, KIT, write_bundle
from dlp_edge.demo.demo import HERE, export_demo, fetch_backbone
from dlp_edge.export.quantisation import int4
from dlp_edge.untrusted.regular_file import sha256_of


def tell(step: str, fraction: float) -> None:
    print(f"{fraction:4.0%}  {step}", file=sys.stderr)


def main() -> None:
    int4.LARGE_HEAD = sys.maxsize
    gguf = fetch_backbone(tell)
    with tempfile.TemporaryDirectory() as scratch:
        exported, again = Path(scratch) / "exported", Path(scratch) / "again"
        export_demo(gguf, exported, tell)
        kit = {
            path.name: path.read_bytes()
            for path in sorted(exported.iterdir())
            if path.name not in COMPUTED
        }
        again.mkdir()
        write_bundle(kit, gguf, HERE / "adapters", again, tell)
        compare(exported, again)
        kit[files.MANIFEST] = manifest_of(open_bundle(exported).manifest, again)
    write_kit(kit)
    print(f"{KIT}: {KIT.stat().st_size / 1e6:.1f} MB")


def write_kit(kit: dict[str, bytes]) -> None:
    with zipfile.ZipFile(KIT, "w") as archive:
        for name, data in kit.items():
            entry = zipfile.ZipInfo(name)  # of no date, so that it is reproducible
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)


def compare(exported: Path, again: Path) -> None:
    """Ends with an error unless both hold the same; the rotations are rounded differently."""
    if (exported / files.ADAPTERS).read_bytes() != (again / files.ADAPTERS).read_bytes():
        sys.exit("the adapters are packed differently")
    _, graph = open_bundle(exported).graph()
    one, other = (
        np.memmap(bundle / files.BACKBONE_DATA, np.uint8, "r") for bundle in (exported, again)
    )
    for name, tensor in graph.tensors.items():
        if tensor.raw is not None:  # in the graph itself
            continue
        place = slice(tensor.offset, tensor.offset + tensor.size)
        if name.endswith("_cache"):
            distance = np.abs(one[place].view(np.float32) - other[place].view(np.float32)).max()
            if distance > 1e-7:
                sys.exit(f"{name} differs by {distance:.1e}")
        elif (one[place] != other[place]).any():
            sys.exit(f"{name} is computed differently")


def manifest_of(manifest: Manifest, folder: Path) -> bytes:
    """The manifest with the hash of the weights that are in the folder."""
    path = folder / files.BACKBONE_DATA
    entry = FileEntry(path.stat().st_size, sha256_of(path))
    changed = replace(manifest, files={**manifest.files, files.BACKBONE_DATA: entry})
    return dump_manifest(changed).encode()


if __name__ == "__main__":
    main()
