"""The backbone's weights, read once: into memory, tensor by tensor, and into a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dlp_edge.onnx_bytes.reader import Tensor
from dlp_edge.untrusted.regular_file import BLOCK

Weights = dict[str, npt.NDArray[Any]]

_TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2"}


def read_weights(
    file: BinaryIO, size: int, tensors: Iterable[Tensor], tell: Callable[[float], None]
) -> tuple[Weights, int, str]:
    """Reads a weight file from its beginning to its end.

    The bytes that are given out are those that were hashed: the file is not mapped, so one that
    is replaced or cut meanwhile or later changes nothing and cannot end the process.

    Args:
        size: of the file, as it should be.
        tensors: what lies in it, without overlaps; those that lie in the graph are passed over.

    Returns:
        The weights by name, the bytes found (more than `size` where the file goes on) and their
        SHA-256.
    """
    digest, at = hashlib.sha256(), 0
    weights: Weights = {}
    outside = sorted((t for t in tensors if t.raw is None), key=lambda tensor: tensor.offset)

    def skip(stop: int) -> None:
        nonlocal at
        while at < stop and (block := file.read(min(BLOCK, stop - at))):
            hasher.submit(digest.update, block)
            at += len(block)

    # One tensor is hashed, in another thread, while the next one is read.
    with ThreadPoolExecutor(1) as hasher:
        for tensor in outside:
            skip(tensor.offset)
            array = np.empty(tensor.shape, _TYPES[tensor.dtype])
            view = array.reshape(-1).view(np.uint8).data
            at += file.readinto(view)  # type: ignore[attr-defined]
            hasher.submit(digest.update, view)
            weights[tensor.name] = array
            tell(at / max(1, size))
        skip(size + 1)
    return weights, at, digest.hexdigest()
