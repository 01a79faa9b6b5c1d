"""Fusing where the backbone is: the stacked adapters lie on the device, and a small graph gathers
their rows. From the host come a few numbers, whatever the size of the adapters."""

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
from dlp_edge.onnx_bytes.reader import FLOAT, FLOAT16
from dlp_edge.onnx_bytes.writer import gather_and_scale
from dlp_edge.runtime.engine.bound_tensor import DeviceTensor
from dlp_edge.runtime.engine.device import Device, open_session
from dlp_edge.runtime.engine.ort_errors import engine_errors

_TYPES = {"float32": FLOAT, "float16": FLOAT16}

Kind = tuple[int, int, tuple[tuple[int, int], ...]]  # sizes of slots, and the columns of its parts


class OnDeviceFuser:
    """Does what `CopyingFuser` does, on the device.

    Slots of one kind, of L layers, have their adapters in two tensors: A [L, R, h] and B [L, R, d],
    scaled, and zero outside of a part's columns. An adapter has the same rows in all layers; where
    a layer lacks some they are zeros, as is the last row, which fills up shorter fusions. So a
    fusion is one gathering for all layers: rows [G, rho] and weights [G, rho, 1] in, A [L, G, rho,
    h] and B [L, G, rho, d] out, where a layer's pair lies as its slot wants it.
    """

    def __init__(
        self,
        stack: AdapterStack,
        slots: Sequence[Slot],
        dtype: str,
        device: Device,
        sequences: int = 1,
    ) -> None:
        self.shared_inputs: dict[str, npt.NDArray[Any]] = {}  # every input changes with the fusion
        session = open_session(gather_and_scale(_TYPES[dtype]), device)
        kinds: dict[Kind, list[Slot]] = {}
        for slot in slots:
            columns = tuple((part.start, part.stop) for part in slot.parts)
            kinds.setdefault((slot.input_size, slot.output_size, columns), []).append(slot)
        self._layers = [
            _Layers(stack, alike, np.dtype(dtype), session, device.kind) for alike in kinds.values()
        ]
        self._chosen: list[Mapping[str, float]] = [{}] * sequences

    def sibling(self, sequences: int) -> OnDeviceFuser:
        """Another one, for so many sequences, over the same tensors."""
        other = copy.copy(self)
        other._layers = [layers.sibling() for layers in self._layers]
        other._chosen = [{}] * sequences
        return other

    def fuse(self, weights: Mapping[str, float], sequence: int = 0) -> dict[str, DeviceTensor]:
        """Gives one sequence the adapters with these weights; returns, of all
        sequences, `<slot>.A` [G, rho, h] and `<slot>.B` [G, rho, d] of each slot."""
        self._chosen[sequence] = {name: weight for name, weight in weights.items() if weight != 0}
        return self._tensors()

    def move(self, source: int, target: int) -> dict[str, DeviceTensor]:
        """Gives one sequence's fusion to another; returns those of all sequences."""
        self._chosen[target] = self._chosen[source]
        return self._tensors()

    def _tensors(self) -> dict[str, DeviceTensor]:
        return {
            name: rows
            for layers in self._layers
            for name, rows in layers.gather(self._chosen).items()
        }


@dataclass(frozen=True)
class _Room:
    """Where fusions of one rank are written: A and B of all layers, and the slots' shares."""

    fused: list[ort.OrtValue]
    tensors: dict[str, DeviceTensor]


class _Layers:
    """The slots of one kind."""

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
        # For each part: adapter -> its rows, the same in all layers.
        self._rows: list[dict[str, range]] = []
        height = 0
        for index in range(len(slots[0].parts)):
            modules = [slot.parts[index].module for slot in slots]
            self._rows.append({})
            for name, own in stack.rows.items():
                rank = max((own[module].rank for module in modules if module in own), default=0)
                self._rows[-1][name] = range(height, height + rank)
                height += rank
        self._zero = height
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
        self._rooms: dict[int, _Room] = {}

    def sibling(self) -> _Layers:
        other = copy.copy(self)
        other._rooms = {}
        return other

    def gather(self, chosen: Sequence[Mapping[str, float]]) -> dict[str, DeviceTensor]:
        """The tensors of these slots, for all sequences, which are under these fusions."""
        found = [
            [(row, weights[name]) for part in self._rows for name in weights for row in part[name]]
            for weights in chosen
        ]
        rho = _rounded(max(map(len, found)))
        rows = np.full((len(chosen), rho), self._zero, np.int64)
        scale = np.zeros((len(chosen), rho, 1), self._dtype)
        for sequence, pairs in enumerate(found):
            for at, (row, weight) in enumerate(pairs):
                rows[sequence, at], scale[sequence, at] = row, weight
        with engine_errors(self._kind):
            if rho not in self._rooms:
                self._rooms[rho] = self._make_room(len(chosen), rho)
            room = self._rooms[rho]
            self._run(rows, scale, room)
        return room.tensors

    def _run(
        self, rows: npt.NDArray[np.int64], weights: npt.NDArray[np.floating], room: _Room
    ) -> None:
        binding = self._session.io_binding()
        for name, stacked in zip(("A", "B"), self._stacks, strict=True):
            binding.bind_ortvalue_input(name, stacked)
        for name, numbers in (("rows", rows), ("weights", weights)):
            binding.bind_cpu_input(name, numbers)
        for name, fused in zip(("fused_A", "fused_B"), room.fused, strict=True):
            binding.bind_ortvalue_output(name, fused)
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _make_room(self, sequences: int, rho: int) -> _Room:
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
        return _Room(fused, tensors)


def _rounded(rank: int) -> int:
    """8, 16, 32, ...: few ranks are few captured graphs, and none is nothing, to which a device has
    no pointer."""
    return max(8, 1 << (rank - 1).bit_length()) if rank else 8
