"""Tensors bound to a graph by address (onnxruntime I/O binding), on the host or a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.runtime.engine.ort_errors import engine_errors

Shape = tuple[int, ...]
Location = tuple[int, Shape]  # address and shape of a bound range


class BoundTensor:
    """An array [G, ...] whose rows can be bound to a graph.

    On a CPU it is the host array itself, elsewhere a device copy; `upload` and `download`
    synchronise the two.
    """

    def __init__(self, array: npt.NDArray[Any], kind: str) -> None:
        self.host = array
        self._kind = kind
        with engine_errors(kind):
            self._value = ort.OrtValue.ortvalue_from_numpy(array, kind, 0)

    def is_backed_by(self, source: object) -> bool:
        """Whether this tensor wraps that very array."""
        return self.host is source

    @property
    def shape(self) -> Shape:
        return self.host.shape

    def upload(self) -> None:
        """Copy the host array to the device."""
        if self._kind != "cpu":
            self._value.update_inplace(self.host)

    def download(self, first: int = 0, count: int | None = None) -> None:
        """Copy what a pass wrote into the rows [first, first + count) back to the host array."""
        if self._kind != "cpu":
            self.host[...] = self._value.numpy()

    def location(self, first: int, count: int) -> Location:
        """Address and shape of the rows [first, first + count)."""
        row = self.host.nbytes // max(1, len(self.host))
        return self._value.data_ptr() + first * row, (count, *self.host.shape[1:])

    def copy_tokens(self, other: BoundTensor, source: int, target: int, length: int) -> None:
        """Copy a sequence's first `length` tokens; both are caches [G, heads, tokens, size]."""
        if self._kind != "cpu":  # the Python API has no device-to-device copy
            self.host, other.host = self._value.numpy(), other._value.numpy()
        self.host[target, :, :length] = other.host[source, :, :length]
        self.upload()

    def bind_input(self, binding: ort.IOBinding, name: str, first: int, count: int) -> None:
        if self._kind == "webgpu":  # whole, see RowTensors
            binding.bind_ortvalue_input(name, self._value)
        else:
            binding.bind_input(name, *self._bound(first, count))

    def bind_output(self, binding: ort.IOBinding, name: str, first: int, count: int) -> None:
        if self._kind == "webgpu":
            binding.bind_ortvalue_output(name, self._value)
        else:
            binding.bind_output(name, *self._bound(first, count))

    def _bound(self, first: int, count: int) -> tuple[str, int, object, Shape, int]:
        """Device, its index, dtype, shape and address of the rows [first, first + count)."""
        address, shape = self.location(first, count)
        return self._kind, 0, self.host.dtype.type, shape, address


class RowTensors(BoundTensor):
    """An array [G, ...] with a device buffer for each row.

    For WebGPU, where an address is a buffer's handle: only whole buffers can be bound.
    """

    def __init__(self, array: npt.NDArray[Any], kind: str) -> None:
        self.host = array
        self._kind = kind
        with engine_errors(kind):
            self._rows = [
                ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array[row : row + 1]), kind)
                for row in range(len(array))
            ]

    def upload(self) -> None:
        for row, value in enumerate(self._rows):
            value.update_inplace(np.ascontiguousarray(self.host[row : row + 1]))

    def download(self, first: int = 0, count: int | None = None) -> None:
        stop = len(self._rows) if count is None else first + count
        for row in range(first, stop):
            self.host[row] = self._rows[row].numpy()[0]

    def location(self, first: int, count: int) -> Location:
        return self._rows[first].data_ptr(), (count, *self.host.shape[1:])

    def copy_tokens(self, other: BoundTensor, source: int, target: int, length: int) -> None:
        assert isinstance(other, RowTensors)
        row = self._rows[target].numpy()
        row[0, :, :length] = other._rows[source].numpy()[0, :, :length]
        self._rows[target].update_inplace(row)

    def bind_input(self, binding: ort.IOBinding, name: str, first: int, count: int) -> None:
        binding.bind_ortvalue_input(name, self._rows[first])

    def bind_output(self, binding: ort.IOBinding, name: str, first: int, count: int) -> None:
        binding.bind_ortvalue_output(name, self._rows[first])


def sequence_tensor(array: npt.NDArray[Any], kind: str) -> BoundTensor:
    """A tensor [G, ...] with a row for each sequence."""
    return RowTensors(array, kind) if kind == "webgpu" else BoundTensor(array, kind)


class DeviceTensor:
    """One layer [G, rho, n] of a device tensor [L, G, rho, n] that a graph writes."""

    def __init__(
        self, value: ort.OrtValue, layer: int, dtype: np.dtype[np.floating], kind: str
    ) -> None:
        self._value, self._layer, self._dtype, self._kind = value, layer, dtype, kind
        self.shape: Shape = tuple(value.shape()[1:])

    def is_backed_by(self, source: object) -> bool:
        return self is source

    def upload(self) -> None:
        """No-op: the data is on the device."""

    def numpy(self) -> npt.NDArray[np.floating]:
        """A host copy."""
        copied: npt.NDArray[np.floating] = self._value.numpy()[self._layer]
        return copied

    def location(self, first: int, count: int) -> Location:
        """Address and shape of the rows [first, first + count)."""
        row = int(np.prod(self.shape[1:])) * self._dtype.itemsize
        address = self._value.data_ptr() + (self._layer * self.shape[0] + first) * row
        return address, (count, *self.shape[1:])

    def bind_input(self, binding: ort.IOBinding, name: str, first: int, count: int) -> None:
        address, shape = self.location(first, count)
        binding.bind_input(name, self._kind, 0, self._dtype.type, shape, address)
