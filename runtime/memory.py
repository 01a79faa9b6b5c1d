"""Estimate the memory of a bundle, check what is available, and release it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from dlp_edge.bundle import files
from dlp_edge.bundle.bundle import Bundle, open_bundle
from dlp_edge.bundle.files import file_name
from dlp_edge.bundle.manifest import BackboneEntry, Manifest
from dlp_edge.errors import ResourceError, UsageError
from dlp_edge.runtime.engine.operators import find_operators
from dlp_edge.types import Estimate

# Resident size of a backbone on a CPU over its file's size: onnxruntime repacks weights, loads a
# shared head twice, and widens fp16. Measured: docs/decisions/memory.md.
RESIDENT_FACTORS = {"int8": 1.45, "int4": 1.4, "nf4": 0.82, "fp16": 2.43, "fp32": 1.21}
IN_PLACE_FACTORS = {"int8": 1.05, "int4": 1.05}  # the custom operators read weights in place
TOKENIZER_FACTOR = 4.5  # over the size of its JSON
ROUTER_FACTOR = 3.0  # over the size of its files

RESERVE = 4 << 20  # bytes of address space reserved for the tokenizer


@dataclass(frozen=True)
class CacheBudgets:
    """Bytes of KV caches.

    Attributes:
        sessions: of all sessions together; None is no limit.
        prefixes: of the prefixes that requests share; 0 keeps none.
    """

    sessions: int | None = None
    prefixes: int = 0


def check_address_space() -> None:
    """Raise MemoryError if the process's address space is nearly exhausted.

    The tokenizers library aborts the process when an allocation fails.
    """
    for limit, used in _address_space():
        if limit - used < RESERVE:
            raise MemoryError


def cache_bytes(backbone: BackboneEntry, tokens: int) -> int:
    """Size of a KV cache for this many tokens: keys and values of all layers."""
    per_token = 2 * backbone.num_layers * backbone.num_kv_heads * backbone.head_size
    return per_token * tokens * np.dtype(backbone.dtype).itemsize


def estimate(path: str | Path, max_context: int) -> Estimate:
    """Estimate the memory that loading a bundle takes, from its manifest alone.

    Raises:
        BundleError: it is not a bundle.
        UsageError: max_context < 1.
    """
    if max_context < 1:
        raise UsageError(f"max_context is {max_context}", "Choose at least 1")
    return _estimate(open_bundle(path).manifest, max_context)


def check_memory(bundle: Bundle) -> None:
    """Raise ResourceError if there is not enough memory to load the bundle.

    The KV cache does not count: its pages are committed as they are used.
    """
    memory = _estimate(bundle.manifest, 1)
    # While onnxruntime repacks the weights, they are in memory twice.
    needed = memory.total
    if bundle.manifest.backbone.quantisation not in _in_place():
        needed += bundle.manifest.files[files.BACKBONE_DATA].size
    if memory.available is not None and needed > memory.available:
        raise ResourceError(
            f"loading takes about {needed / 1e9:.1f} GB of memory, but only "
            f"{memory.available / 1e9:.1f} GB are free",
            "Close other programs, or use a smaller or quantised bundle",
        )


def _estimate(manifest: Manifest, max_context: int) -> Estimate:
    backbone = manifest.backbone
    on_cpu = manifest.target == "cpu"

    def size(name: str) -> int:
        entry = manifest.files.get(file_name(manifest, name))
        return entry.size if entry else 0

    in_place = on_cpu and backbone.quantisation in _in_place()
    factors = {**RESIDENT_FACTORS, **_in_place()} if on_cpu else {}
    factor = factors.get(backbone.quantisation, 1.0)
    router = size(files.ROUTER) + size(files.ROUTER_HEAD) + size(files.SPLITTER)
    texts = TOKENIZER_FACTOR * (size(files.TOKENIZER) + size(files.ROUTER_TOKENIZER))
    return Estimate(
        weights=int(factor * size(files.BACKBONE_DATA)),
        adapters=size(files.ADAPTERS) // (2 if in_place else 1),  # loaded as fp16
        router=int(ROUTER_FACTOR * router),
        tokenizers=int(texts),
        cache=cache_bytes(backbone, min(max_context, backbone.context_length)),
        available=available() if on_cpu else None,
    )


def _in_place() -> dict[str, float]:
    return IN_PLACE_FACTORS if find_operators() is not None else {}


def available() -> int:
    """Bytes of memory that this process can still allocate.

    The least of the machine's free memory and what is left of the limits of its control groups and
    address space.
    """
    free = int(psutil.virtual_memory().available)
    limits = [*_cgroup_limits(), *_address_space()]
    return min([free, *(limit - used for limit, used in limits)])


def _address_space() -> Iterator[tuple[int, int]]:
    """Limit and usage of this process's address space, if it is limited (POSIX)."""
    with contextlib.suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            yield limit, int(psutil.Process().memory_info().vms)


def _cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """Limits and usage of this process's control group and its parents.

    Linux only: cgroup v2, or the memory controller of v1. Reclaimable page cache does not count.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = ("memory.max", "memory.current", "inactive_file")
        base = root
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "memory"
        place = base / path.lstrip("/")
        # Inside a container the path may be the host's and not exist; only the root is there then.
        for folder in (place, *place.parents):
            if base == folder or base in folder.parents:
                with contextlib.suppress(OSError, ValueError):
                    limit = int((folder / names[0]).read_text())  # "max" is not a number: no limit
                    used = int((folder / names[1]).read_text())
                    stat = dict(
                        entry.split() for entry in (folder / "memory.stat").read_text().splitlines()
                    )
                    yield limit, used - int(stat.get(names[2], 0))


def release_memory() -> None:
    """Collect garbage and return freed memory to the operating system."""
    gc.collect()
    trim()


def trim() -> None:
    """Return freed memory to the operating system; glibc kept 200 of 270 MB after a close."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
