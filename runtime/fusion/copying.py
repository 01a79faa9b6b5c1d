"""Fusing selected adapters into one low-rank pair per slot (eq. 6 of arXiv 2410.01497).

delta(x) = sum_n w_n s_n (x A_n^T) B_n^T is one pair of rank rho = sum r_n: the selected A's
stacked, and the selected B's, each scaled by w_n s_n, stacked. Two small matrix products per
slot, however many adapters are fused.
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
from dlp_edge.checks import check_number
from dlp_edge.errors import UsageError
from dlp_edge.runtime.options import texts

Tensors = dict[str, npt.NDArray[Any]]  # what a fusion feeds the graph, by the names of its inputs

LARGEST_WEIGHT = 1e3  # beyond it logits overflow and nothing sensible is meant


@dataclass(frozen=True)
class _Pair:
    """What goes into one slot: A [G, rho, h] and B [G, rho, d] for G sequences."""

    a: Array
    b: Array


@dataclass(frozen=True, eq=False)
class _Piece:
    """One adapter's rows for one module of a slot.

    Attributes:
        a, b: A [r, h] and B [r, d], as views into the stack.
        place: what it takes of a slot: the columns where d lies, and r.
    """

    a: Array
    b: Array
    scaling: float
    place: tuple[slice, int]


class CopyingFuser:
    """Writes fusions of a stack's adapters for a backbone's slots, one for each of G sequences.

    The pairs lie in buffers that are used again: a fusion is valid until the next one is made.
    One sequence's pair has just the rank that its fusion has. Several share the largest rank
    there was so far; the rows that a smaller fusion leaves over are zeros in B, which add nothing.
    """

    def __init__(
        self, stack: AdapterStack, slots: Sequence[Slot], dtype: str, sequences: int = 1
    ) -> None:
        self.shared_inputs: Tensors = {}  # every input changes with the fusion
        self._slots = tuple(slots)
        self._dtype = np.dtype(dtype)
        self._pieces = {slot.name: _pieces_of(slot, stack) for slot in slots}
        self._begin(sequences)

    def sibling(self, sequences: int) -> CopyingFuser:
        """Another one, for so many sequences, that shares what this one knows of the stack."""
        other = copy.copy(self)
        other._begin(sequences)
        return other

    def _begin(self, sequences: int) -> None:
        self._sequences = sequences
        self._buffers = {slot.name: self._allocate(slot, 0) for slot in self._slots}
        self._given: dict[str, _Pair] = {}
        # What lies in the buffers, from the top; elsewhere B is zero.
        self._written: dict[str, list[list[_Piece]]] = {
            slot.name: [[]] * sequences for slot in self._slots
        }

    def fuse(self, weights: Mapping[str, float], sequence: int = 0) -> Tensors:
        """Gives one sequence the adapters with these weights (none: the base model, rho = 0).

        Returns:
            For each slot `<slot>.A` [G, rho, h] and `<slot>.B` [G, rho, d], of all G sequences.
        """
        chosen = {name: weight for name, weight in weights.items() if weight != 0}
        with np.errstate(over="ignore"):  # the answer ends as a NonFiniteError
            return _tensors(
                {slot.name: self._fuse_slot(slot, chosen, sequence) for slot in self._slots}
            )

    def move(self, source: int, target: int) -> Tensors:
        """Gives one sequence's fusion to another; returns those of all sequences."""
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
        rho = sum(piece.place[1] for piece, _ in pieces)
        pair = self._with_room(slot, rho)
        a, b = pair.a[sequence], pair.b[sequence]
        before = self._written[slot.name][sequence]
        if [piece.place for piece, _ in pieces] != [piece.place for piece in before]:
            b[:], before = 0, []
        row = 0
        for index, (piece, weight) in enumerate(pieces):
            columns, rank = piece.place
            rows = slice(row, row + rank)
            if not before or before[index] is not piece:
                a[rows] = piece.a
            scale = self._dtype.type(weight * piece.scaling)
            np.multiply(piece.b, scale, out=b[rows, columns])
            row += rank
        self._written[slot.name][sequence] = [piece for piece, _ in pieces]
        return pair if self._sequences > 1 else self._top(slot, rho)

    def _top(self, slot: Slot, rho: int) -> _Pair:
        """The first rho rows; the same arrays as long as these are the same rows."""
        pair, given = self._buffers[slot.name], self._given.get(slot.name)
        if given is None or given.a.base is not pair.a or given.a.shape[1] != rho:
            given = _Pair(pair.a[:, :rho], pair.b[:, :rho])
            self._given[slot.name] = given
        return given

    def _with_room(self, slot: Slot, rho: int) -> _Pair:
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
    """For each module of a slot: adapter -> its rows."""
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


def parse_weights(
    adapters: str | Sequence[str] | Mapping[str, float], known: Sequence[str]
) -> dict[str, float]:
    """The weights that an application pins: a name, names (weight 1 each) or name -> weight.

    Raises:
        UsageError: a name that is no adapter of the bundle, or a weight that is not finite.
    """
    if isinstance(adapters, Mapping):
        weights = dict(adapters)
    else:
        weights = dict.fromkeys(texts("adapters", adapters), 1.0)
    check_names(weights, known)
    for name, weight in weights.items():
        check_number(f"the weight of {name}", weight)
        if abs(weight) > LARGEST_WEIGHT:
            raise UsageError(
                f"the weight of {name} is {weight}", f"Stay within +-{LARGEST_WEIGHT:g}"
            )
    return {name: float(weight) for name, weight in weights.items()}


def check_names(names: Mapping[str, float] | Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for a name that is no adapter of the bundle."""
    for name in names:
        if name not in known:
            raise UsageError(
                f"the bundle has no adapter {name!r}",
                f"It has: {', '.join(known)}" if known else "It has no adapters",
            )
