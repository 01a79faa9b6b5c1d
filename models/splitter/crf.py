"""The log partition function of the splitter's segmentations, and its gradient.

A semi-Markov chain over L tokens and K kinds of segment: a token stays in its segment at no cost,
enters a request or an introduction at `start`, or glue, from another kind, at `glue_start`. Sums
run in scaled linear space (forward and backward algorithm), since thousands of small operations
under autograd take longer than the network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Array = npt.NDArray[np.float64]


class LogPartition(torch.autograd.Function):
    """fits [B, L, K], starts and glue_starts [B, L], mask [B, L] -> log Z [B]."""

    @staticmethod
    def forward(
        ctx: Any, fits: Tensor, starts: Tensor, glue_starts: Tensor, mask: Tensor, glue: int
    ) -> Tensor:
        fit, start, glue_start, inside = (
            each.detach().double().numpy() for each in (fits, starts, glue_starts, mask)
        )
        log_z, gradients = _sum_product(fit, start, glue_start, inside, glue)
        ctx.save_for_backward(*(torch.from_numpy(each).to(fits.dtype) for each in gradients))
        return torch.from_numpy(log_z).to(fits.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        fits, starts, glue_starts = ctx.saved_tensors
        row = gradient.unsqueeze(1)
        return fits * row.unsqueeze(2), starts * row, glue_starts * row, None, None


def _sum_product(
    fits: _Array, starts: _Array, glue_starts: _Array, mask: _Array, glue: int
) -> tuple[_Array, tuple[_Array, _Array, _Array]]:
    """log Z [B], and the marginal probabilities of kinds, starts and glue starts."""
    length = fits.shape[1]
    inside = mask[:, :, None] > 0
    highest = fits.max(2) * mask
    fit = np.where(inside, np.exp(fits - highest[:, :, None]), 1.0)
    enter = np.exp(starts) * mask
    enter_glue = np.exp(glue_starts) * mask
    others = np.ones(fits.shape[2])
    others[glue] = 0

    forward = np.empty_like(fit)
    scale = np.empty(mask.shape)
    now = fit[:, 0]
    for at in range(length):
        if at:
            before = now
            now = before + enter[:, at, None] * others
            now[:, glue] += enter_glue[:, at] * (1 - before[:, glue])
            now *= fit[:, at]
        scale[:, at] = now.sum(1)
        now = now / scale[:, at, None]
        forward[:, at] = now

    kinds = np.empty_like(fit)
    entered, entered_glue = np.zeros_like(starts), np.zeros_like(starts)
    later = np.ones_like(now)
    kinds[:, -1] = forward[:, -1]
    for at in range(length - 1, 0, -1):
        ahead = fit[:, at] * later / scale[:, at, None]
        request = enter[:, at] * (ahead @ others)
        into_glue = enter_glue[:, at] * ahead[:, glue]
        entered[:, at] = request
        entered_glue[:, at] = into_glue * (1 - forward[:, at - 1, glue])
        later = ahead + request[:, None] + into_glue[:, None] * others
        kinds[:, at - 1] = forward[:, at - 1] * later
    log_z = (np.log(scale) + highest).sum(1)
    return log_z, (kinds * inside, entered, entered_glue)
