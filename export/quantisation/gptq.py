"""GPTQ (Frantar et al., arXiv 2210.17323): 4-bit quantisation that minimises the output error.

Columns are rounded one by one; the columns not yet rounded compensate for the error.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dlp_edge.export.quantisation.quantized_matrix import BLOCK, QuantizedMatrix
from dlp_edge.models.fitting import one_thread

Array = npt.NDArray[np.floating]
DAMPING = 0.01  # share of the mean diagonal added to the Hessian to make it invertible
SOLVED = 64  # columns of a triangular matrix that is inverted by solving
ROW_CHUNK = 16384  # rows quantised at a time, to bound memory
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # candidate factors for the range of a block


def round_gptq(matrix: Array, products: Array, dtype: npt.DTypeLike) -> QuantizedMatrix:
    """QuantizedMatrix of a matrix.

    Args:
        matrix: [N, K].
        products: X^T X [K, K] over inputs X.
        dtype: of the scales.
    """
    width = matrix.shape[1]
    padded = -(-width // BLOCK) * BLOCK
    hessian = torch.zeros(padded, padded)
    hessian[:width, :width] = torch.from_numpy(products)
    with one_thread():
        factor = _inverse_factor(hessian)
        parts = [
            _round(matrix[start : start + ROW_CHUNK], factor, dtype)
            for start in range(0, len(matrix), ROW_CHUNK)
        ]
    levels, scales, zeros = (np.concatenate(column) for column in zip(*parts, strict=True))
    return QuantizedMatrix(4, levels, scales, zeros)


def _round(
    matrix: Array, factor: torch.Tensor, dtype: npt.DTypeLike
) -> tuple[npt.NDArray[np.uint8], Array, npt.NDArray[np.uint8]]:
    """Levels, scales and zeros of some rows, which do not depend on the others."""
    rows, width = matrix.shape
    blocks = len(factor) // BLOCK
    remaining = torch.zeros(rows, blocks * BLOCK)
    remaining[:, :width] = torch.from_numpy(matrix.astype(np.float32))
    levels = torch.zeros(rows, blocks * BLOCK)
    scales, zeros = torch.zeros(rows, blocks), torch.zeros(rows, blocks)
    for index in range(blocks):
        start, stop = index * BLOCK, (index + 1) * BLOCK
        inside = factor[start:stop, start:stop]
        own = remaining[:, start:stop]
        scale, zero = _best_grid(own, inside.diagonal() ** -2, dtype)
        scales[:, index], zeros[:, index] = scale, zero
        lost = torch.zeros(rows, BLOCK)
        for column in range(BLOCK):
            level = (own[:, column] / scale + zero).round().clamp(0, 15)
            levels[:, start + column] = level
            lost[:, column] = (own[:, column] - (level - zero) * scale) / inside[column, column]
            own[:, column:] -= lost[:, column : column + 1] * inside[column, column:]
        remaining[:, stop:] -= lost @ factor[start:stop, stop:]
    return (
        levels.to(torch.uint8).reshape(rows, blocks, BLOCK).numpy(),
        scales.numpy().astype(dtype),
        zeros.to(torch.uint8).numpy(),
    )


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian; inputs that are always zero have
    no weight."""
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    # H = R R^T with R upper triangular (the Cholesky factor of H with its axes reversed), so
    # H^-1 = (R^-1)^T R^-1. Inverting H and factoring the inverse takes twice as long.
    return _inverse(torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1))


def _inverse(upper: torch.Tensor) -> torch.Tensor:
    """The inverse of an upper triangular matrix, by halves: products are faster than solving."""
    size = len(upper)
    if size <= SOLVED:
        return torch.linalg.solve_triangular(upper, torch.eye(size), upper=True)
    at = size // 2
    found = torch.zeros_like(upper)
    found[:at, :at] = _inverse(upper[:at, :at])
    found[at:, at:] = _inverse(upper[at:, at:])
    found[:at, at:] = -found[:at, :at] @ (upper[:at, at:] @ found[at:, at:])
    return found


def _best_grid(
    block: torch.Tensor, importance: torch.Tensor, dtype: npt.DTypeLike
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and integer zero point [N] of a block [N, BLOCK]: the range with the least error."""
    low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        scale = torch.from_numpy(((high - low) * shrink / 15).numpy().astype(dtype)).float()
        scale[scale == 0] = 1
        zero = (-low * shrink / scale).round().clamp(0, 15)
        level = (block / scale[:, None] + zero[:, None]).round().clamp(0, 15)
        error = (((level - zero[:, None]) * scale[:, None] - block) ** 2 * importance).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
