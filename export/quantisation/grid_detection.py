"""Detects weights that already lie on a 4-bit grid, and keeps them exactly.

A Q4_0, Q4_1 or Q4_K tensor of a GGUF file, and other 4-bit weights with blocks of 32 or a
multiple, stay on their grid when they are dequantised: w = d q + m with q in 0..15 in each block.
Rounding them to another 16-level grid would lose more than the first quantisation did. MatMulNBits
is fast only for d (q - z) with an integer z, and m / d is no integer. So z = round(-m/d), and the
remainder r = m + z d is one number per block: sum_k r x_k = 32 r mean(x). The block means are
appended to the input, and 32 r to the matrix, as further 4-bit columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlp_edge.export.quantisation.quantized_matrix import BLOCK, QuantizedMatrix, cut, round_int4

Array = npt.NDArray[np.floating]
# Largest distance of a weight from its level, in steps: sources are rounded to fp16 or bf16. A
# block of weights off any grid passes with a probability of about (2 * 0.06)^30.
TOLERANCE = 0.06
SAMPLE = 64  # rows checked before the whole matrix
ROW_CHUNK = 2048  # rows processed at a time, to bound memory


@dataclass(frozen=True)
class Grid:
    """Weights that lie on 16 levels.

    Attributes:
        matrix: [N, K], with integer zero points.
        remainder: [N, K / BLOCK]; added to the weights of a block, it gives the source.
    """

    matrix: QuantizedMatrix
    remainder: Array

    @property
    def is_whole(self) -> bool:
        """Whether the zero points of the source were integers, so that the remainder is zero."""
        steps = self.matrix.scales.astype(np.float32)
        return bool((np.abs(self.remainder) <= TOLERANCE * steps).all())

    def with_block_means(self, dtype: npt.DTypeLike) -> QuantizedMatrix:
        """The matrix [N, K + blocks], with the remainder as further columns.

        Its input must be followed by its block means.
        """
        extra = round_int4(self.remainder * BLOCK, dtype)
        own = self.matrix
        if own.zeros is None or extra.zeros is None:
            raise AssertionError("4-bit levels of a grid have zeros")
        return QuantizedMatrix(
            4,
            np.concatenate([own.levels, extra.levels], 1),
            np.concatenate([own.scales, extra.scales], 1),
            np.concatenate([own.zeros, extra.zeros], 1),
        )


def find_grid(matrix: Array, dtype: npt.DTypeLike) -> Grid | None:
    """The grid of a matrix [N, K], with scales of `dtype`; None if some block is off any grid."""
    if matrix.shape[1] % BLOCK or _fit(cut(matrix[:SAMPLE]), dtype) is None:
        return None
    parts = []
    for start in range(0, len(matrix), ROW_CHUNK):
        part = _fit(cut(matrix[start : start + ROW_CHUNK]), dtype)
        if part is None:
            return None
        parts.append(part)
    levels, scales, zeros, remainder = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return Grid(QuantizedMatrix(4, levels, scales, zeros), remainder)


def _fit(
    blocks: Array, dtype: npt.DTypeLike
) -> tuple[npt.NDArray[np.uint8], Array, npt.NDArray[np.uint8], Array] | None:
    """levels, scales, zeros, remainder of blocks [N, blocks, BLOCK]; None if there is no grid.

    The span of a block is an integer number of steps: 15 if it uses both end levels.
    """
    flat = blocks.reshape(-1, BLOCK).astype(np.float32)
    low = flat.min(1)
    span = flat.max(1) - low
    step = np.where(span > 0, 0, 1).astype(np.float32)  # a constant block lies on any grid
    for steps in range(15, 0, -1):
        open_blocks = np.flatnonzero(step == 0)
        if not len(open_blocks):
            break
        size = span[open_blocks] / steps
        position = (flat[open_blocks] - low[open_blocks, None]) / size[:, None]
        fits = np.abs(position - np.rint(position)).max(1) <= TOLERANCE
        step[open_blocks[fits]] = size[fits]
    if not step.all():
        return None
    levels = np.rint((flat - low[:, None]) / step[:, None])
    zeros = np.clip(np.rint(-low / step), 0, 15)
    scales = step.astype(dtype)
    remainder = low + zeros * scales.astype(np.float32)
    shape = blocks.shape[:2]
    return (
        levels.astype(np.uint8).reshape(blocks.shape),
        scales.reshape(shape),
        zeros.astype(np.uint8).reshape(shape),
        remainder.reshape(shape),
    )
