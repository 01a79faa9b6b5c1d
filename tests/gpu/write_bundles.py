"""Writes tiny bundles for the GPU tests: `python -m tests.gpu.write_bundles OUT [FAMILY ...]`.

One of every family and format for CUDA, OUT/FAMILY-FORMAT. They are exported where torch and the
model builder are, and tested where onnxruntime-gpu is: the two onnxruntimes exclude each other.
Existing ones are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dlp_edge.export.backbone import FORMATS
from dlp_edge.export.pipeline import export_bundle
from tests.testing.families import FAMILIES, make_adapter, make_backbone

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "attention": {"r": 8, "lora_alpha": 8, "target_modules": r".*\.(q|v|qkv)_proj"},
}


def write(out: Path, family: str) -> None:
    sources = out / "sources" / family
    backbone = sources / "backbone"
    if not backbone.exists():
        make_backbone(family, backbone)
        for name, settings in ADAPTERS.items():
            make_adapter(backbone, sources / name, **settings)
    adapters = {name: sources / name for name in ADAPTERS}
    for quantisation in FORMATS["cuda"]:
        bundle = out / f"{family}-{quantisation}"
        if not bundle.exists():
            export_bundle(str(backbone), adapters, None, bundle, quantisation, "cuda", fast=True)
            print(bundle.name, flush=True)


if __name__ == "__main__":
    for name in sys.argv[2:] or FAMILIES:
        write(Path(sys.argv[1]), name)
