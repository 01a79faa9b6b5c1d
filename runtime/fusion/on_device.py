"""Fuse on the device: the stacked adapters live there, and a small graph gathers their rows.

The host sends a few numbers, whatever the adapters' sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.bundle.adapter_stack import AdapterStack
from dlp_edge.bundle.manifest import Slot
from dlp_edge.native_calls import native_calls
from dlp_edge.onnx_bytes.reader import FLOAT, FLOAT16
from dlp_edge.onnx_bytes.writer import gather_and_scale
from dlp_edge.runtime.engine.bound_tensor import DeviceTensor
from dlp_edge.runtime.engine.device import Device, open_session
from dlp_edge.runtime.engine.ort_errors import engine_errors

_TYPES = {"float32": FLOAT, "float16": FLOAT16}

SlotShape = tuple[int, int, tuple[tuple[int, int], ...]]  # h, d and the columns of its parts


class OnDeviceFuser:
    """Gathers the selected adapters on the device, for each of G sequences.

    Slots of the same shape, one per layer, keep their adapters in two tensors: A [L, R, h] and
    B [L, R, d], B scaled and zero outside a part's columns. An adapter has the same rows in all
    layers; rows that a layer lacks are zero, as is the last row, which pads shorter fusions. One
    gather therefore serves all layers: rows [G, rho] and weights [G, rho, 1] in, A [L, G, rho, h]
    and B [L, G, rho, d] out, of which each layer's pair is bound to its slot.

    Args:
        dtype: of the graph's slots.
        sequences: G.

    Attributes:
        shared_inputs: empty, since every input changes with the fusion.
    """

    def __init__(
        self,
        stack: AdapterStack,
        slots: Sequence[Slot],
        dtype: str,
        device: Device,
        sequences: int = 1,
    ) -> None:
        self.shared_inputs: dict[str, npt.NDArray[Any]] = {}
        session = open_session(gather_and_scale(_TYPES[dtype]), device)
        groups: dict[SlotShape, list[Slot]] = {}
        for slot in slots:
            columns = tuple((part.start, part.stop) for part in slot.parts)
            groups.setdefault((slot.input_size, slot.output_size, columns), []).append(slot)
        self._groups = [
            _SlotGroup(stack, group, np.dtype(dtype), session, device.kind)
            for group in groups.values()
        ]
        self._active: list[Mapping[str, float]] = [{}] * sequences

    def sibling(self, sequences: int) -> OnDeviceFuser:
        """A fuser for another number of sequences over the same stacks."""
        other = copy.copy(self)
        other._groups = [group.sibling() for group in self._groups]
        other._active = [{}] * sequences
        return other

    def fuse(self, weights: Mapping[str, float], sequence: int = 0) -> dict[str, DeviceTensor]:
        """Give one sequence the adapters with these weights; {} is the base model.

        Returns:
            `<slot>.A` [G, rho, h] and `<slot>.B` [G, rho, d] of each slot.
        """
        self._active[sequence] = {name: weight for name, weight in weights.items() if weight != 0}
        return self._tensors()

    def move(self, source: int, target: int) -> dict[str, DeviceTensor]:
        """Copy one sequence's fusion to another; returns the tensors of all sequences."""
        self._active[target] = self._active[source]
        return self._tensors()

    def _tensors(self) -> dict[str, DeviceTensor]:
        return {
            name: tensor
            for group in self._groups
            for name, tensor in group.gather(self._active).items()
        }


@dataclass(frozen=True)
class _Output:
    """The output buffers of one rank: A and B of all layers, and the views for each slot."""

    fused: list[ort.OrtValue]
    tensors: dict[str, DeviceTensor]


class _SlotGroup:
    """The slots of one shape, one per layer."""

    def __init__(
        self,
        stack: AdapterStack,
        slots: Sequence[Slot],
        dtype: np.dtype[np.floating],
        session: ort.InferenceSession,
        kind: str,
    ) -> None:
        self._names = [slot.name for slot in slots]
        self._session, self._kind, self._dtype = session, kind, dtype
        # For each part: adapter -> its rows in A and B, the same in all layers.
        self._rows: list[dict[str, range]] = []
        height = 0
        for index in range(len(slots[0].parts)):
            modules = [slot.parts[index].module for slot in slots]
            self._rows.append({})
            for name, own in stack.rows.items():
                rank = max((own[module].rank for module in modules if module in own), default=0)
                self._rows[-1][name] = range(height, height + rank)
                height += rank
        self._zero_row = height
        a = np.zeros((len(slots), height + 1, slots[0].input_size), dtype)
        b = np.zeros((len(slots), height + 1, slots[0].output_size), dtype)
        for layer, slot in enumerate(slots):
            for part, places in zip(slot.parts, self._rows, strict=True):
                for name, place in places.items():
                    at = stack.rows[name].get(part.module)
                    if at is not None:
                        rows = slice(place.start, place.start + at.rank)
                        scaled = stack.b[part.module][at.slice].astype(np.float32) * at.scaling
                        a[layer, rows] = stack.a[part.module][at.slice]
                        b[layer, rows, part.start : part.stop] = scaled
        self._stacks = [ort.OrtValue.ortvalue_from_numpy(side, kind, 0) for side in (a, b)]
        self._sizes = (a.shape[2], b.shape[2])
        self._outputs: dict[int, _Output] = {}

    def sibling(self) -> _SlotGroup:
        other = copy.copy(self)
        other._outputs = {}
        return other

    def gather(self, fusions: Sequence[Mapping[str, float]]) -> dict[str, DeviceTensor]:
        """Gather the fusions [G]; returns the slots' tensors by input name."""
        selected = [
            [(row, weights[name]) for part in self._rows for name in weights for row in part[name]]
            for weights in fusions
        ]
        rho = _padded_rank(max(map(len, selected)))
        rows = np.full((len(fusions), rho), self._zero_row, np.int64)
        scale = np.zeros((len(fusions), rho, 1), self._dtype)
        for sequence, pairs in enumerate(selected):
            for at, (row, weight) in enumerate(pairs):
                rows[sequence, at], scale[sequence, at] = row, weight
        with engine_errors(self._kind):
            if rho not in self._outputs:
                self._outputs[rho] = self._allocate(len(fusions), rho)
            output = self._outputs[rho]
            self._run(rows, scale, output)
        return output.tensors

    def _run(
        self, rows: npt.NDArray[np.int64], weights: npt.NDArray[np.floating], output: _Output
    ) -> None:
        binding = self._session.io_binding()
        for name, stacked in zip(("A", "B"), self._stacks, strict=True):
            binding.bind_ortvalue_input(name, stacked)
        for name, numbers in (("rows", rows), ("weights", weights)):
            binding.bind_cpu_input(name, numbers)
        for name, fused in zip(("fused_A", "fused_B"), output.fused, strict=True):
            binding.bind_ortvalue_output(name, fused)
        with native_calls:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

    def _allocate(self, sequences: int, rho: int) -> _Output:
        fused = [
            ort.OrtValue.ortvalue_from_shape_and_type(
                (len(self._names), sequences, rho, size), self._dtype, self._kind, 0
            )
            for size in self._sizes
        ]
        tensors = {
            f"{name}.{side}": DeviceTensor(value, layer, self._dtype, self._kind)
            for side, value in zip("AB", fused, strict=True)
            for layer, name in enumerate(self._names)
        }
        return _Output(fused, tensors)


def _padded_rank(rank: int) -> int:
    """Round ranks up to powers of two, at least 8, to limit CUDA graph captures.

    Rank 0 is padded, too: an empty device tensor has no address to bind.
    """
    return max(8, 1 << (rank - 1).bit_length()) if rank else 8
