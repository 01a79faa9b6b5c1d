"""Fusing without copying: which rows of the stacked adapters are in force, and with what weights.

For our own operators (`runtime/native/operators.c`), which read the rows where they lie. A change of
fusion writes three numbers for each module and adapter, whatever the size of the adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dlp_edge.manifest import Slot
from dlp_edge.runtime.fusion import Tensors
from dlp_edge.runtime.operator_graph import SPANS, WEIGHTS
from dlp_edge.stack import AdapterStack, Array


class SpanFuser:
    """Gives each of G sequences a fusion of a stack's adapters.

    The tables are written in place: a fusion is valid until the next one is made. They are as wide
    as the most adapters of any sequence; what is left over has rank 0.

    Attributes:
        adapters: the inputs that are the same for all fusions: `<module>.A` [R, h] and
            `<module>.B` [R, d].
    """

    def __init__(self, stack: AdapterStack, slots: Sequence[Slot], sequences: int = 1) -> None:
        parts = [(slot, part) for slot in slots for part in slot.parts]
        self.adapters: dict[str, Array] = {}
        for slot, part in parts:
            sizes = {"A": slot.input_size, "B": part.stop - part.start}
            for side, stacked in (("A", stack.a), ("B", stack.b)):
                rows = stacked.get(part.module, np.zeros((0, sizes[side])))
                self.adapters[f"{part.module}.{side}"] = np.ascontiguousarray(rows, np.float32)
        # For each adapter: first row and rank [P, 2], and scaling [P].
        self._known: dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = {}
        for name, rows in stack.rows.items():
            found = [rows.get(part.module) for _, part in parts]
            spans = [(at.offset, at.rank) if at else (0, 0) for at in found]
            scalings = [at.scaling if at else 0.0 for at in found]
            self._known[name] = (np.array(spans, np.int32), np.array(scalings, np.float32))
        self._parts = len(parts)
        self._begin(sequences)

    def sibling(self, sequences: int) -> SpanFuser:
        """Another one, for so many sequences, over the same adapters."""
        other = copy.copy(self)
        other._begin(sequences)
        return other

    def _begin(self, sequences: int) -> None:
        self._chosen: list[Mapping[str, float]] = [{}] * sequences
        self._spans = np.zeros((sequences, self._parts, 1, 2), np.int32)
        self._weights = np.zeros((sequences, self._parts, 1), np.float32)

    def fuse(self, weights: Mapping[str, float], sequence: int = 0) -> Tensors:
        """Gives one sequence the adapters with these weights (none: the base model); returns the
        tables of all G sequences, SPANS [G, P, n, 2] and WEIGHTS [G, P, n]."""
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
        spans = np.zeros((*self._spans.shape[:2], width, 2), np.int32)
        weights = np.zeros((*self._weights.shape[:2], width), np.float32)
        spans[:, :, :kept] = self._spans[:, :, :kept]
        weights[:, :, :kept] = self._weights[:, :, :kept]
        self._spans, self._weights = spans, weights
