"""Loads and hashes the backbone's weights in one pass; narrows scales."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dlp_edge.onnx_bytes.reader import Tensor
from dlp_edge.untrusted.regular_file import BLOCK, OnFraction

Weights = dict[str, npt.NDArray[Any]]

WAITING = 8  # blocks and tensors that are read but not hashed yet

_TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2"}


def read_weights(
    file: BinaryIO, size: int, tensors: Iterable[Tensor], on_progress: OnFraction
) -> tuple[Weights, int, str]:
    """Reads a weight file from start to end.

    The returned bytes are the hashed bytes. The file is not memory-mapped, so replacing or
    truncating it later changes nothing and cannot crash the process.

    Args:
        size: expected size of the file in bytes.
        tensors: the tensors, without overlaps; those stored in the graph itself are skipped.
        on_progress: called with the fraction done.

    Returns:
        The weights by name, the number of bytes read (more than `size` if the file is longer)
        and their SHA-256.

    Raises:
        MemoryError: no memory for the weights, or for the thread that hashes.
    """
    digest, at = hashlib.sha256(), 0
    weights: Weights = {}
    waiting: deque[Future[None]] = deque()
    external = sorted((t for t in tensors if t.raw is None), key=lambda tensor: tensor.offset)

    def hash_beside(data: bytes | memoryview) -> None:
        # Bounded: a file of gaps would otherwise wait for its hash in memory, whole.
        if len(waiting) == WAITING:
            waiting.popleft().result()
        try:
            waiting.append(hasher.submit(digest.update, data))
        except RuntimeError as error:  # "can't start new thread"
            raise MemoryError(str(error)) from error

    def skip(stop: int) -> None:
        nonlocal at
        while at < stop and (block := file.read(min(BLOCK, stop - at))):
            hash_beside(block)
            at += len(block)

    # A second thread hashes one tensor while the next one is read.
    with ThreadPoolExecutor(1) as hasher:
        for tensor in external:
            skip(tensor.offset)
            array = np.empty(tensor.shape, _TYPES[tensor.dtype])
            view = array.reshape(-1).view(np.uint8).data
            at += file.readinto(view)  # type: ignore[attr-defined]
            hash_beside(view)
            weights[tensor.name] = array
            on_progress(at / max(1, size))
        skip(size + 1)
    return weights, at, digest.hexdigest()


def in_half(scales: npt.NDArray[Any]) -> npt.NDArray[np.float16] | None:
    """Scales in half precision, if each changes by at most 2^-11 of itself or of the average one.
    That is so where none overflows and the average is a normal number: subnormal ones are 2^-24
    apart."""
    sizes, half = np.abs(scales), np.finfo(np.float16)
    fits = sizes.max(initial=0) <= half.max and sizes.mean() >= half.smallest_normal
    return scales.astype(np.float16) if fits else None
