"""Matrices in whole numbers: what onnxruntime's MatMulNBits and GatherBlockQuantized read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32  # weights that share a scale; MatMulNBits takes 16, 32, 64, ...


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [N, K], cut along K into blocks: w = scale * (level - zero).

    Attributes:
        bits: 4 or 8.
        levels: [N, blocks, BLOCK], the last block filled up with the zero level.
        scales: [N, blocks].
        zeros: [N, blocks]; None is the middle level everywhere.
    """

    bits: int
    levels: Bytes
    scales: Array
    zeros: Bytes | None = None

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """As MatMulNBits wants them, in its order: levels [N, blocks, BLOCK * bits / 8], scales
        [N, blocks] and, if there are, zeros [N, ceil(blocks * bits / 8)]. Of two 4-bit numbers
        the first lies in the low half of the byte."""
        tensors: dict[str, npt.NDArray[Any]] = {"levels": self.levels, "scales": self.scales}
        if self.zeros is not None:
            tensors["zeros"] = np.pad(self.zeros, ((0, 0), (0, self.zeros.shape[1] % 2)))
        if self.bits == 8:
            return tensors
        return {
            kind: tensor if kind == "scales" else tensor[..., 0::2] | (tensor[..., 1::2] << 4)
            for kind, tensor in tensors.items()
        }

    def dense(self, width: int) -> Array:
        """The matrix [N, width] that these levels stand for."""
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros[..., None]
        values = (self.levels.astype(np.float32) - zeros) * self.scales[..., None]
        dense: Array = values.reshape(len(values), -1)[:, :width]
        return dense


def cut(matrix: Array) -> Array:
    """A matrix [N, K] as blocks [N, ceil(K / BLOCK), BLOCK], filled up with zeros."""
    rows, width = matrix.shape
    filled = np.pad(matrix, ((0, 0), (0, -width % BLOCK)))
    return filled.reshape(rows, -1, BLOCK)


def round_int8(matrix: Array, dtype: npt.DTypeLike) -> QuantizedMatrix:
    """The nearest of 255 levels, symmetric about zero. [N, K] -> scales of `dtype`."""
    blocks = cut(matrix)
    scales = _scales(np.abs(blocks).max(-1) / 127, dtype)
    levels = np.clip(np.rint(blocks / _wide(scales)) + 128, 1, 255).astype(np.uint8)
    return QuantizedMatrix(8, levels, scales)


def round_int4(matrix: Array, dtype: npt.DTypeLike) -> QuantizedMatrix:
    """The nearest of 16 levels between a block's least and greatest weight, zero among them."""
    blocks = cut(matrix)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scales = _scales((high - low) / 15, dtype)
    zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 0, 15)
    levels = np.clip(np.rint(blocks / _wide(scales)) + zeros[..., None], 0, 15)
    return QuantizedMatrix(4, levels.astype(np.uint8), scales, zeros.astype(np.uint8))


def _scales(scales: Array, dtype: npt.DTypeLike) -> Array:
    """As `dtype`; 1 for a block of nothing but zeros (or what `dtype` takes for zero)."""
    rounded = scales.astype(dtype)
    return np.where(rounded > 0, rounded, np.ones((), dtype))


def _wide(scales: Array) -> Array:
    return scales.astype(np.float32)[..., None]
