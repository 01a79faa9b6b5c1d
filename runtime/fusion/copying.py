"""Fuse the selected adapters into one low-rank pair per slot (eq. 6 of arXiv 2410.01497).

delta(x) = sum_n w_n s_n (x A_n^T) B_n^T is one pair of rank rho = sum r_n: the selected A's
stacked, and the selected B's, each scaled by w_n s_n, stacked. That is two small matrix products
per slot, however many adapters are fused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlp_edge.bundle.adapter_stack import AdapterStack, Array
from dlp_edge.bundle.manifest import Slot

Tensors = dict[str, npt.NDArray[Any]]  # graph input -> tensor


@dataclass(frozen=True)
class _Pair:
    """The tensors of one slot: A [G, rho, h] and B [G, rho, d] for G sequences."""

    a: Array
    b: Array


@dataclass(frozen=True, eq=False)
class _Piece:
    """One adapter's rows for one module of a slot.

    Attributes:
        a, b: A [r, h] and B [r, d], as views into the stack.
        layout: the slot's columns that B fills, and r.
    """

    a: Array
    b: Array
    scaling: float
    layout: tuple[slice, int]


class CopyingFuser:
    """Copies the selected adapters into buffers, for each of G sequences.

    Buffers are reused: the tensors of a fusion are valid until the next call. With G = 1 they have
    exactly the fusion's rank. With G > 1 they have the largest rank so far; unused rows of B are
    zero and add nothing.

    Args:
        dtype: of the graph's slots.
        sequences: G.
        least_rank: of a slot's tensors; WebGPU takes no empty ones.

    Attributes:
        shared_inputs: empty, since every input changes with the fusion.
    """

    def __init__(
        self,
        stack: AdapterStack,
        slots: Sequence[Slot],
        dtype: str,
        sequences: int = 1,
        least_rank: int = 0,
    ) -> None:
        self.shared_inputs: Tensors = {}
        self._slots = tuple(slots)
        self._dtype = np.dtype(dtype)
        self._least_rank = least_rank
        self._pieces = {slot.name: _pieces_of(slot, stack) for slot in slots}
        self._reset(sequences)

    def sibling(self, sequences: int) -> CopyingFuser:
        """A fuser for another number of sequences over the same stack."""
        other = copy.copy(self)
        other._reset(sequences)
        return other

    def _reset(self, sequences: int) -> None:
        self._sequences = sequences
        self._buffers = {slot.name: self._allocate(slot, self._least_rank) for slot in self._slots}
        self._views: dict[str, _Pair] = {}
        # The pieces in the buffers, from row 0; B is zero elsewhere.
        self._written: dict[str, list[list[_Piece]]] = {
            slot.name: [[]] * sequences for slot in self._slots
        }

    def fuse(self, weights: Mapping[str, float], sequence: int = 0) -> Tensors:
        """Give one sequence the adapters with these weights; {} is the base model (rho = 0).

        Returns:
            `<slot>.A` [G, rho, h] and `<slot>.B` [G, rho, d] of each slot.
        """
        active = {name: weight for name, weight in weights.items() if weight != 0}
        with np.errstate(over="ignore"):  # the answer then fails with a NonFiniteError
            return _tensors(
                {slot.name: self._fuse_slot(slot, active, sequence) for slot in self._slots}
            )

    def move(self, source: int, target: int) -> Tensors:
        """Copy one sequence's fusion to another; returns the tensors of all sequences."""
        for name, pair in self._buffers.items():
            pair.a[target], pair.b[target] = pair.a[source], pair.b[source]
            self._written[name][target] = self._written[name][source]
        return _tensors(self._buffers)

    def _fuse_slot(self, slot: Slot, weights: Mapping[str, float], sequence: int) -> _Pair:
        pieces = [
            (piece, weight)
            for module in self._pieces[slot.name]
            for name, weight in weights.items()
            if (piece := module.get(name)) is not None
        ]
        rho = sum(piece.layout[1] for piece, _ in pieces)
        pair = self._ensure_rank(slot, rho)
        a, b = pair.a[sequence], pair.b[sequence]
        before = self._written[slot.name][sequence]
        if [piece.layout for piece, _ in pieces] != [piece.layout for piece in before]:
            b[:], before = 0, []
        row = 0
        for index, (piece, weight) in enumerate(pieces):
            columns, rank = piece.layout
            rows = slice(row, row + rank)
            if not before or before[index] is not piece:
                a[rows] = piece.a
            scale = self._dtype.type(weight * piece.scaling)
            np.multiply(piece.b, scale, out=b[rows, columns])
            row += rank
        self._written[slot.name][sequence] = [piece for piece, _ in pieces]
        return pair if self._sequences > 1 else self._view(slot, max(rho, self._least_rank))

    def _view(self, slot: Slot, rho: int) -> _Pair:
        """The first rho rows; the same array objects while rank and buffer stay the same, so that
        the decoder need not bind them again."""
        pair, view = self._buffers[slot.name], self._views.get(slot.name)
        if view is None or view.a.base is not pair.a or view.a.shape[1] != rho:
            view = _Pair(pair.a[:, :rho], pair.b[:, :rho])
            self._views[slot.name] = view
        return view

    def _ensure_rank(self, slot: Slot, rho: int) -> _Pair:
        """The slot's buffers, grown to rank rho if they are smaller."""
        pair = self._buffers[slot.name]
        if pair.a.shape[1] < rho:
            grown = self._allocate(slot, rho)
            grown.a[:, : pair.a.shape[1]], grown.b[:, : pair.b.shape[1]] = pair.a, pair.b
            self._buffers[slot.name] = pair = grown
        return pair

    def _allocate(self, slot: Slot, rho: int) -> _Pair:
        return _Pair(
            np.zeros((self._sequences, rho, slot.input_size), self._dtype),
            np.zeros((self._sequences, rho, slot.output_size), self._dtype),
        )


def _tensors(pairs: Mapping[str, _Pair]) -> Tensors:
    return {
        f"{name}.{side}": tensor
        for name, pair in pairs.items()
        for side, tensor in (("A", pair.a), ("B", pair.b))
    }


def _pieces_of(slot: Slot, stack: AdapterStack) -> list[dict[str, _Piece]]:
    """For each module of a slot: adapter -> its piece."""
    return [
        {
            name: _Piece(
                stack.a[part.module][at.slice],
                stack.b[part.module][at.slice],
                at.scaling,
                (slice(part.start, part.stop), at.rank),
            )
            for name, rows in stack.rows.items()
            if (at := rows.get(part.module)) is not None
        }
        for part in slot.parts
    ]
