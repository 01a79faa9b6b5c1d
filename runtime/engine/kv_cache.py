"""The memory of KV caches."""

from __future__ import annotations

import math
import mmap

import numpy as np
import numpy.typing as npt

from dlp_edge.bundle.manifest import BackboneEntry
from dlp_edge.errors import ResourceError
from dlp_edge.runtime.engine.bound_tensor import BoundTensor, sequence_tensor


def make_cache(
    backbone: BackboneEntry, sequences: int, max_context: int, kind: str
) -> dict[str, BoundTensor]:
    """Two buffers [G, kv heads, max_context, head size] a layer: keys and values.

    Args:
        kind: of the device.

    Raises:
        ResourceError: there is no room.
    """
    shape = (sequences, backbone.num_kv_heads, max_context, backbone.head_size)
    # The operating system commits pages of zeros only when they are written.
    zeros = np.zeros if sequences == 1 else lazy_zeros
    try:
        return {
            f"{layer}.{part}": sequence_tensor(zeros(shape, np.dtype(backbone.dtype)), kind)
            for layer in range(backbone.num_layers)
            for part in ("key", "value")
        }
    except MemoryError as error:
        raise ResourceError(
            f"not enough memory for a cache of {max_context} tokens",
            "Load the bundle with a smaller max_context, or close other sessions",
        ) from error


def lazy_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """Zeros in pages of the smallest size, which are committed as they are written.

    numpy asks for huge pages. A cache of several sequences is written in many places, a little in
    each: 50 tokens on each of 16 rows then commit 3 GB instead of 50 MB (measured on the demo).

    Raises:
        MemoryError: there is no room.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not hasattr(mmap, "MADV_NOHUGEPAGE") or not size:
        return np.zeros(shape, dtype)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        raise MemoryError(f"{size} bytes") from error
    return np.frombuffer(pages, dtype).reshape(shape)
