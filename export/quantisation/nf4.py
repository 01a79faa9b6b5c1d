"""NF4 (QLoRA, arXiv 2305.14314) by bitsandbytes, in the layout of onnxruntime's MatMulBnb4."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlp_edge.export.suppress_output import suppress_output

BLOCK = 64  # bitsandbytes' default
NF4 = 1  # MatMulBnb4's quant_type


@dataclass(frozen=True)
class Nf4:
    """A matrix [N, K] in row-major order: two levels per byte, the first in the high nibble.

    Attributes:
        levels: [N * K / 2].
        absmax: [ceil(N * K / BLOCK)], fp32.
    """

    levels: npt.NDArray[np.uint8]
    absmax: npt.NDArray[np.float32]


def round_nf4(matrix: npt.NDArray[np.floating]) -> Nf4:
    """Quantise a matrix [N, K] with bitsandbytes' `quantize_4bit`, without double quantisation."""
    import torch

    with suppress_output():
        from bitsandbytes.functional import quantize_4bit

        weights = torch.from_numpy(np.ascontiguousarray(matrix, np.float32))
        levels, state = quantize_4bit(
            weights, blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
    return Nf4(levels.numpy().reshape(-1), state.absmax.numpy().reshape(-1))
