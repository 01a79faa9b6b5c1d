"""Fusing without copying: which rows of the stacked adapters are in force, and with what weights.

For our own operator (`runtime/native/operators.c`), which reads the rows where they lie. A change
of fusion writes four numbers for each module and adapter, whatever the size of the adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dlp_edge.bundle.adapter_stack import AdapterStack, converted
from dlp_edge.bundle.manifest import Slot
from dlp_edge.runtime.engine.operator_graph import ADAPTERS, SPANS, WEIGHTS

Tensors = dict[str, npt.NDArray[Any]]  # graph input -> tensor


class InPlaceFuser:
    """Gives each of G sequences a fusion of a stack's adapters.

    The tables are written in place: a fusion is valid until the next one is made. They are as wide
    as the most adapters of any sequence; what is left over has rank 0.

    Attributes:
        shared_inputs: inputs that no fusion changes: the numbers of all adapters (fp16).
    """

    def __init__(self, stack: AdapterStack, slots: Sequence[Slot], sequences: int = 1) -> None:
        parts = [part for slot in slots for part in slot.parts]
        numbers = converted(stack, "float16").numbers
        self.shared_inputs: Tensors = {ADAPTERS: numbers} if parts else {}
        # For each adapter: where A and B begin among the numbers and its rank [P, 3], scaling [P].
        self._known: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = {}
        for name, rows in stack.rows.items():
            spans = np.zeros((len(parts), 3), np.int64)
            scalings = np.zeros(len(parts), np.float32)
            for index, part in enumerate(parts):
                if (at := rows.get(part.module)) is not None:
                    a, b = (stack.starts[f"{part.module}.{side}"] for side in "AB")
                    a += at.offset * stack.a[part.module].shape[1]
                    b += at.offset * stack.b[part.module].shape[1]
                    spans[index], scalings[index] = (a, b, at.rank), at.scaling
            self._known[name] = (spans, scalings)
        self._parts = len(parts)
        self._begin(sequences)

    def sibling(self, sequences: int) -> InPlaceFuser:
        """Another one, for so many sequences, over the same adapters."""
        other = copy.copy(self)
        other._begin(sequences)
        return other

    def _begin(self, sequences: int) -> None:
        self._chosen: list[Mapping[str, float]] = [{}] * sequences
        self._spans = np.zeros((sequences, self._parts, 1, 3), np.int64)
        self._weights = np.zeros((sequences, self._parts, 1), np.float32)

    def fuse(self, weights: Mapping[str, float], sequence: int = 0) -> Tensors:
        """Gives one sequence the adapters with these weights (none: the base model); returns the
        tables of all G sequences, SPANS [G, P, n, 3] and WEIGHTS [G, P, n]."""
        chosen = {name: weight for name, weight in weights.items() if weight != 0}
        self._chosen[sequence] = chosen
        self._make_room()
        self._spans[sequence] = 0
        for at, (name, weight) in enumerate(chosen.items()):
            spans, scalings = self._known[name]
            self._spans[sequence, :, at] = spans
            with np.errstate(over="ignore"):  # the answer ends as a NonFiniteError
                self._weights[sequence, :, at] = np.float32(weight) * scalings
        return self._tables()

    def move(self, source: int, target: int) -> Tensors:
        """Gives one sequence's fusion to another; returns the tables of all sequences."""
        self._chosen[target] = self._chosen[source]
        self._spans[target], self._weights[target] = self._spans[source], self._weights[source]
        return self._tables()

    def _tables(self) -> Tensors:
        return {SPANS: self._spans, WEIGHTS: self._weights} if self._parts else {}

    def _make_room(self) -> None:
        """Tables as wide as the most adapters that a sequence has."""
        width, before = max(1, *map(len, self._chosen)), self._weights.shape[2]
        if width == before or (width < before and len(self._chosen) > 1):
            return
        kept = min(width, before)
        spans = np.zeros((*self._spans.shape[:2], width, 3), np.int64)
        weights = np.zeros((*self._weights.shape[:2], width), np.float32)
        spans[:, :, :kept] = self._spans[:, :, :kept]
        weights[:, :, :kept] = self._weights[:, :, :kept]
        self._spans, self._weights = spans, weights
