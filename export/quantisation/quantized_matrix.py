"""Block-quantised integer matrices, as onnxruntime's MatMulNBits and GatherBlockQuantized read
them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlp_edge.bundle.weight_file import in_half

Array = npt.NDArray[np.floating]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32  # weights that share a scale; MatMulNBits supports 16, 32, 64, ...
ROW_CHUNK = 4096  # rows rounded at a time, to bound memory


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [N, K], cut along K into blocks: w = scale * (level - zero).

    Attributes:
        bits: 4 or 8.
        levels: [N, blocks, BLOCK], the last block padded with the zero level.
        scales: [N, blocks].
        zeros: [N, blocks]; None means the middle level everywhere.
    """

    bits: int
    levels: Bytes
    scales: Array
    zeros: Bytes | None = None

    @property
    def row_bytes(self) -> int:
        """The bytes of a row's levels, as stored."""
        return self.levels.shape[1] * BLOCK * self.bits // 8

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """The inputs of MatMulNBits, in its order: levels [N, blocks, BLOCK * bits / 8], scales
        [N, blocks] and, unless None, zeros [N, ceil(blocks * bits / 8)]. Of two 4-bit numbers
        the first lies in the low nibble."""
        tensors: dict[str, npt.NDArray[Any]] = {"levels": self.levels, "scales": self.scales}
        if self.zeros is not None:
            tensors["zeros"] = np.pad(self.zeros, ((0, 0), (0, self.zeros.shape[1] % 2)))
        if self.bits == 8:
            return tensors
        return {
            kind: tensor if kind == "scales" else tensor[..., 0::2] | (tensor[..., 1::2] << 4)
            for kind, tensor in tensors.items()
        }

    def stored(self) -> dict[str, npt.NDArray[Any]]:
        """The same with scales in half precision where they fit: in single precision they are an
        eighth of a 4-bit matrix."""
        half = in_half(self.scales)
        return self.tensors() if half is None else {**self.tensors(), "scales": half}

    def dense(self, width: int) -> Array:
        """Dequantise to [N, width]."""
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros[..., None]
        values = (self.levels.astype(np.float32) - zeros) * self.scales[..., None]
        dense: Array = values.reshape(len(values), -1)[:, :width]
        return dense


def cut(matrix: Array) -> Array:
    """A matrix [N, K] as blocks [N, ceil(K / BLOCK), BLOCK], zero-padded."""
    rows, width = matrix.shape
    filled = np.pad(matrix, ((0, 0), (0, -width % BLOCK)))
    return filled.reshape(rows, -1, BLOCK)


def round_int8(matrix: Array, dtype: npt.DTypeLike) -> QuantizedMatrix:
    """Round [N, K] to the nearest of 255 levels, symmetric about zero; scales are of `dtype`."""
    rows, width = matrix.shape
    blocks = -(-width // BLOCK)
    levels = np.empty((rows, blocks, BLOCK), np.uint8)
    scales = np.empty((rows, blocks), dtype)
    for start in range(0, rows, ROW_CHUNK):
        part = slice(start, start + ROW_CHUNK)
        values = cut(matrix[part])
        scales[part] = _scales(np.abs(values).max(-1) / 127, dtype)
        levels[part] = np.clip(np.rint(values / _wide(scales[part])) + 128, 1, 255)
    return QuantizedMatrix(8, levels, scales)


def round_int4(matrix: Array, dtype: npt.DTypeLike) -> QuantizedMatrix:
    """Round to the nearest of 16 levels between the extremes of a block; zero is always a level."""
    blocks = cut(matrix)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scales = _scales((high - low) / 15, dtype)
    zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 0, 15)
    levels = np.clip(np.rint(blocks / _wide(scales)) + zeros[..., None], 0, 15)
    return QuantizedMatrix(4, levels.astype(np.uint8), scales, zeros.astype(np.uint8))


def _scales(scales: Array, dtype: npt.DTypeLike) -> Array:
    """Scales as `dtype`; 1 where they are zero or underflow to it."""
    rounded = scales.astype(dtype)
    return np.where(rounded > 0, rounded, np.ones((), dtype))


def _wide(scales: Array) -> Array:
    return scales.astype(np.float32)[..., None]
