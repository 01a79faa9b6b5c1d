"""Writes tiny bundles for the GPU tests: `python -m tests.gpu.write_bundles OUT [--webgpu]`.

For CUDA, one of every family and format, OUT/FAMILY-FORMAT, and some for the CPU as well; with
--webgpu, some families in every format. They are exported where torch and the model builder are,
and tested where a GPU's onnxruntime is: the onnxruntimes exclude each other. Existing bundles are
kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.testing.families import FAMILIES, make_adapter, make_backbone

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "attention": {"r": 8, "lora_alpha": 8, "target_modules": r".*\.(q|v|qkv)_proj"},
}
FUSIONS: list[dict[str, float]] = [{}, {"all": 1.0}, {"all": 0.6, "attention": 0.4}]
IDS = list(range(40, 90))
EXPECTED = "expected.npy"  # PEFT's logits after each of the last five of IDS, for each fusion
WEBGPU_FAMILIES = ("smollm2", "qwen3", "mistral", "phi3", "granite", "gemma2")
SHARED_FAMILIES = ("smollm2", "qwen3", "mistral", "phi3", "granite")  # for the CPU and CUDA at once


def write(out: Path, family: str, quantisation: str, target: str) -> None:
    bundle = out / "-".join((family, quantisation, *target.split(",")[1:]))
    if bundle.exists():
        return
    # Here, so that tests may import the constants where there is no torch.
    from dlp_edge.export.pipeline import export_bundle
    from tests.testing.oracle import Peft

    sources = out / "sources" / family
    if not sources.exists():
        make_backbone(family, sources / "backbone")
        for name, settings in ADAPTERS.items():
            make_adapter(sources / "backbone", sources / name, **settings)
        peft = Peft(sources / "backbone", {name: sources / name for name in ADAPTERS})
        np.save(sources / EXPECTED, np.concatenate([peft.logits(IDS, f)[-5:] for f in FUSIONS]))
    adapters = {name: sources / name for name in ADAPTERS}
    backbone = str(sources / "backbone")
    export_bundle(backbone, adapters, None, bundle, quantisation, target, fast=True)
    print(bundle.name, flush=True)


def main(out: Path, webgpu: bool) -> None:
    from dlp_edge.export.backbone import FORMATS

    if webgpu:
        for family in WEBGPU_FAMILIES:
            for quantisation in FORMATS["webgpu"]:
                write(out, family, quantisation, "cpu,webgpu")
        return
    for family in FAMILIES:
        for quantisation in FORMATS["cuda"]:
            write(out, family, quantisation, "cuda")
    for family in SHARED_FAMILIES:
        for quantisation in FORMATS["cuda"]:
            write(out, family, quantisation, "cpu,cuda")


if __name__ == "__main__":
    main(Path(sys.argv[1]), webgpu="--webgpu" in sys.argv[2:])
