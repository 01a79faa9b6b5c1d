"""Fuse without copying: tables of the active adapters' rows in the stack, and their weights.

For the custom operator (`runtime/native/operators.c`), which reads the rows in place. A change of
fusion writes four numbers for each module and adapter, whatever the adapters' sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dlp_edge.bundle.adapter_stack import AdapterStack, converted
from dlp_edge.bundle.manifest import Slot
from dlp_edge.runtime.engine.graphs.operator_graph import ADAPTERS, SPANS, WEIGHTS

Tensors = dict[str, npt.NDArray[Any]]  # graph input -> tensor


class InPlaceFuser:
    """Writes tables of the active adapters, for each of G sequences.

    Tables are reused: those of a fusion are valid until the next call. Their width n is the largest
    number of adapters of any sequence; unused entries have rank 0.

    Args:
        sequences: G.

    Attributes:
        shared_inputs: ADAPTERS [T] (fp16), the numbers of all adapters.
    """

    def __init__(self, stack: AdapterStack, slots: Sequence[Slot], sequences: int = 1) -> None:
        parts = [part for slot in slots for part in slot.parts]
        numbers = converted(stack, "float16").numbers
        self.shared_inputs: Tensors = {ADAPTERS: numbers} if parts else {}
        # For each adapter: offsets of A and B in ADAPTERS and the rank [P, 3], and scalings [P].
        self._entries: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = {}
        for name, rows in stack.rows.items():
            spans = np.zeros((len(parts), 3), np.int64)
            scalings = np.zeros(len(parts), np.float32)
            for index, part in enumerate(parts):
                if (at := rows.get(part.module)) is not None:
                    a, b = (stack.starts[f"{part.module}.{side}"] for side in "AB")
                    a += at.offset * stack.a[part.module].shape[1]
                    b += at.offset * stack.b[part.module].shape[1]
                    spans[index], scalings[index] = (a, b, at.rank), at.scaling
            self._entries[name] = (spans, scalings)
        self._parts = len(parts)
        self._reset(sequences)

    def sibling(self, sequences: int) -> InPlaceFuser:
        """A fuser for another number of sequences over the same adapters."""
        other = copy.copy(self)
        other._reset(sequences)
        return other

    def _reset(self, sequences: int) -> None:
        self._active: list[Mapping[str, float]] = [{}] * sequences
        self._spans = np.zeros((sequences, self._parts, 1, 3), np.int64)
        self._weights = np.zeros((sequences, self._parts, 1), np.float32)

    def fuse(self, weights: Mapping[str, float], sequence: int = 0) -> Tensors:
        """Give one sequence the adapters with these weights; {} is the base model.

        Returns:
            SPANS [G, P, n, 3] and WEIGHTS [G, P, n].
        """
        active = {name: weight for name, weight in weights.items() if weight != 0}
        self._active[sequence] = active
        self._resize_tables()
        self._spans[sequence] = 0
        for at, (name, weight) in enumerate(active.items()):
            spans, scalings = self._entries[name]
            self._spans[sequence, :, at] = spans
            with np.errstate(over="ignore"):  # the answer then fails with a NonFiniteError
                self._weights[sequence, :, at] = np.float32(weight) * scalings
        return self._tables()

    def move(self, source: int, target: int) -> Tensors:
        """Copy one sequence's fusion to another; returns the tables of all sequences."""
        self._active[target] = self._active[source]
        self._spans[target], self._weights[target] = self._spans[source], self._weights[source]
        return self._tables()

    def _tables(self) -> Tensors:
        return {SPANS: self._spans, WEIGHTS: self._weights} if self._parts else {}

    def _resize_tables(self) -> None:
        """Fit the tables' width to the sequence with the most adapters."""
        width, before = max(1, *map(len, self._active)), self._weights.shape[2]
        if width == before or (width < before and len(self._active) > 1):
            return
        common = min(width, before)
        spans = np.zeros((*self._spans.shape[:2], width, 3), np.int64)
        weights = np.zeros((*self._weights.shape[:2], width), np.float32)
        spans[:, :, :common] = self._spans[:, :, :common]
        weights[:, :, :common] = self._weights[:, :, :common]
        self._spans, self._weights = spans, weights
