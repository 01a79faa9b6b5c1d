"""Memory: what a bundle will take, what there is, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import numpy as np
import psutil

from dlp_edge import bundle as files
from dlp_edge.bundle import file_name, open_bundle
from dlp_edge.errors import UsageError
from dlp_edge.manifest import BackboneEntry
from dlp_edge.types import Estimate

# What onnxruntime holds of a backbone on a CPU, over the size of its file: it packs weights anew,
# reads a shared head twice, and widens fp16. Measured on the demo backbone (docs/decisions.md).
RESIDENT = {"int8": 1.45, "int4": 1.67, "nf4": 0.82, "fp16": 2.43, "fp32": 1.21}
TOKENIZER = 4.5  # over the size of its JSON
ROUTER = 3.0


def cache_bytes(backbone: BackboneEntry, tokens: int) -> int:
    """Size of a KV cache for so many tokens: keys and values of all layers."""
    per_token = 2 * backbone.num_layers * backbone.num_kv_heads * backbone.head_size
    return per_token * tokens * np.dtype(backbone.dtype).itemsize


def estimate(path: str | Path, max_context: int) -> Estimate:
    """What loading a bundle will take; only its manifest is read.

    Raises:
        BundleError: it is no bundle.
        UsageError: max_context < 1.
    """
    if max_context < 1:
        raise UsageError(f"max_context is {max_context}", "Choose at least 1")
    manifest = open_bundle(path).manifest
    backbone = manifest.backbone
    on_cpu = manifest.target == "cpu"

    def size(name: str) -> int:
        entry = manifest.files.get(file_name(manifest, name))
        return entry.size if entry else 0

    factor = RESIDENT.get(backbone.quantisation, 1.0) if on_cpu else 1.0
    router = size(files.ROUTER) + size(files.ROUTER_HEAD)
    texts = TOKENIZER * (size(files.TOKENIZER) + size(files.ROUTER_TOKENIZER))
    return Estimate(
        weights=int(factor * size(files.BACKBONE_DATA)),
        adapters=size(files.ADAPTERS),
        router=int(ROUTER * router),
        tokenizers=int(texts),
        cache=cache_bytes(backbone, min(max_context, backbone.context_length)),
        available=psutil.virtual_memory().available if on_cpu else None,
    )


def give_back() -> None:
    """Returns freed memory to the operating system, where the C library would keep it: glibc
    kept 200 of 270 MB after a close."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)
