"""Tensors that are bound to a graph by address: the host's, and their copies on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Shape = tuple[int, ...]
Place = tuple[int, Shape]


class BoundTensor:
    """An array [G, ...] on the device, of which a range of rows can be bound to a graph.

    On a CPU it is the array itself; elsewhere a copy, which `upload` brings up to date.
    """

    def __init__(self, array: npt.NDArray[Any], kind: str) -> None:
        self.host = array
        self._kind = kind
        self._value = ort.OrtValue.ortvalue_from_numpy(array, kind, 0)

    def is_backed_by(self, source: object) -> bool:
        """Whether these are the rows of this very array."""
        return self.host is source

    @property
    def shape(self) -> Shape:
        return self.host.shape

    def upload(self) -> None:
        if self._kind != "cpu":
            self._value.update_inplace(self.host)

    def download(self) -> None:
        """Brings the host's array up to date with what a pass wrote."""
        if self._kind != "cpu":
            self.host[...] = self._value.numpy()

    def place(self, first: int, count: int) -> Place:
        """What decides where a range of rows is bound: their address and shape."""
        row = self.host.nbytes // max(1, len(self.host))
        return self._value.data_ptr() + first * row, (count, *self.host.shape[1:])

    def copy_tokens(self, other: BoundTensor, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of a sequence of a cache [G, heads, tokens, size]."""
        if self._kind != "cpu":  # onnxruntime's Python interface copies nothing inside a device
            self.host, other.host = self._value.numpy(), other._value.numpy()
        self.host[target, :, :length] = other.host[source, :, :length]
        self.upload()

    def bind_input(self, binding: ort.IOBinding, name: str, first: int, count: int) -> None:
        binding.bind_input(name, *self._bound(first, count))

    def bind_output(self, binding: ort.IOBinding, name: str, first: int, count: int) -> None:
        binding.bind_output(name, *self._bound(first, count))

    def _bound(self, first: int, count: int) -> tuple[str, int, object, Shape, int]:
        """Device, type, shape and address of the rows [first, first + count)."""
        address, shape = self.place(first, count)
        return self._kind, 0, self.host.dtype.type, shape, address


class DeviceTensor:
    """One layer [G, rho, n] of a tensor [L, G, rho, n] that a graph has written on a device."""

    def __init__(
        self, value: ort.OrtValue, layer: int, dtype: np.dtype[np.floating], kind: str
    ) -> None:
        self._value, self._layer, self._dtype, self._kind = value, layer, dtype, kind
        self.shape: Shape = tuple(value.shape()[1:])

    def is_backed_by(self, source: object) -> bool:
        return self is source

    def upload(self) -> None:
        """It is there already."""

    def numpy(self) -> npt.NDArray[np.floating]:
        """A copy for the host."""
        copied: npt.NDArray[np.floating] = self._value.numpy()[self._layer]
        return copied

    def place(self, first: int, count: int) -> Place:
        """What decides where a range of rows is bound: their address and shape."""
        row = int(np.prod(self.shape[1:])) * self._dtype.itemsize
        address = self._value.data_ptr() + (self._layer * self.shape[0] + first) * row
        return address, (count, *self.shape[1:])

    def bind_input(self, binding: ort.IOBinding, name: str, first: int, count: int) -> None:
        address, shape = self.place(first, count)
        binding.bind_input(name, self._kind, 0, self._dtype.type, shape, address)
