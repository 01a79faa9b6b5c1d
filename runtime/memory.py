"""Memory: what a bundle will take, what there is, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import numpy as np
import psutil

from dlp_edge import bundle as files
from dlp_edge.bundle import open_bundle
from dlp_edge.errors import UsageError
from dlp_edge.manifest import BackboneEntry
from dlp_edge.types import Estimate


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
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    tokens = min(max_context, manifest.backbone.context_length)
    return Estimate(
        weights=sizes[files.BACKBONE] + sizes[files.BACKBONE_DATA],
        adapters=sizes[files.ADAPTERS],
        router=sizes.get(files.ROUTER, 0) + sizes.get(files.ROUTER_TOKENIZER, 0),
        cache=cache_bytes(manifest.backbone, tokens),
        available=psutil.virtual_memory().available if manifest.target == "cpu" else None,
    )


def give_back() -> None:
    """Returns freed memory to the operating system, where the C library would keep it: glibc
    kept 200 of 270 MB after a close."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)
