"""Memory: what a bundle will take, what there is, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from dlp_edge.bundle import bundle as files
from dlp_edge.bundle.bundle import Bundle, file_name, open_bundle
from dlp_edge.bundle.manifest import BackboneEntry, Manifest
from dlp_edge.errors import ResourceError, UsageError
from dlp_edge.runtime.engine.operators import find_operators
from dlp_edge.types import Estimate

# What onnxruntime holds of a backbone on a CPU, over the size of its file: it packs weights anew,
# reads a shared head twice, and widens fp16. Measured in docs/decisions/memory.md.
RESIDENT_FACTORS = {"int8": 1.45, "int4": 1.4, "nf4": 0.82, "fp16": 2.43, "fp32": 1.21}
IN_PLACE_FACTORS = {"int8": 1.05, "int4": 1.05}  # on our own operators, which read what was read
TOKENIZER = 4.5  # over the size of its JSON
ROUTER = 3.0


RESERVE = 4 << 20  # bytes of address space that a request leaves to the tokenizer


def check_address_space() -> None:
    """Raises MemoryError where nearly all address space that the process may have is taken: the
    tokenizers library ends the process when it gets none."""
    for limit, used in _address_space():
        if limit - used < RESERVE:
            raise MemoryError


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
    return _estimate(open_bundle(path).manifest, max_context)


def check_memory(bundle: Bundle) -> None:
    """Raises ResourceError where a bundle cannot be loaded for want of memory. The cache is left
    out: only what is used of it is committed."""
    found = _estimate(bundle.manifest, 1)
    # While onnxruntime packs the weights anew, they are there as they were read, too.
    needed = found.total
    if bundle.manifest.backbone.quantisation not in _in_place():
        needed += bundle.manifest.files[files.BACKBONE_DATA].size
    if found.available is not None and needed > found.available:
        raise ResourceError(
            f"loading takes about {needed / 1e9:.1f} GB of memory, and "
            f"{found.available / 1e9:.1f} GB are free",
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
    router = size(files.ROUTER) + size(files.ROUTER_HEAD)
    texts = TOKENIZER * (size(files.TOKENIZER) + size(files.ROUTER_TOKENIZER))
    return Estimate(
        weights=int(factor * size(files.BACKBONE_DATA)),
        adapters=size(files.ADAPTERS) // (2 if in_place else 1),  # halved when they are loaded
        router=int(ROUTER * router),
        tokenizers=int(texts),
        cache=cache_bytes(backbone, min(max_context, backbone.context_length)),
        available=available() if on_cpu else None,
    )


def _in_place() -> dict[str, float]:
    return IN_PLACE_FACTORS if find_operators() is not None else {}


def available() -> int:
    """Bytes of memory that this process can still take: what the machine has free, or what its
    container or its own address space has, where that is less."""
    free = int(psutil.virtual_memory().available)
    limits = [*_cgroup_limits(), *_address_space()]
    return min([free, *(limit - used for limit, used in limits)])


def _address_space() -> Iterator[tuple[int, int]]:
    """Limit and use of this process's address space, where it is limited (POSIX)."""
    with contextlib.suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            yield limit, int(psutil.Process().memory_info().vms)


def _cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """Limit and use of this process's control group and of those above it (Linux; version 2, or
    the memory controller of version 1); nothing elsewhere. Page cache does not count as used."""
    try:
        lines = own.read_text().splitlines()
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
        # Inside a container the path may be the host's, which is not there: then only the top is.
        for folder in (place, *place.parents):
            if base == folder or base in folder.parents:
                with contextlib.suppress(OSError, ValueError):
                    limit = int((folder / names[0]).read_text())  # "max" is no number: no limit
                    used = int((folder / names[1]).read_text())
                    stat = dict(
                        entry.split() for entry in (folder / "memory.stat").read_text().splitlines()
                    )
                    yield limit, used - int(stat.get(names[2], 0))


def release_memory() -> None:
    """Collects garbage and returns freed memory to the operating system."""
    gc.collect()
    trim()


def trim() -> None:
    """Returns freed memory to the operating system, where the C library would keep it: glibc
    kept 200 of 270 MB after a close."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)
