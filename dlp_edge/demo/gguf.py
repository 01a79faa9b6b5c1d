"""Reads the weights of a GGUF file whose hash is known: the types that the demo's backbone has."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_NUMBERS = "BbHhIif?.xQqd"  # struct's codes for the types of metadata; 8 is text, 9 a list
_TEXT, _LIST = 8, 9
_F32, _Q4_1, _Q8_0 = 0, 3, 8
_BLOCK = 32
_BLOCK_BYTES = {_Q4_1: 20, _Q8_0: 34}


@dataclass(frozen=True)
class _Place:
    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufFile:
    """The tensors of a GGUF file, by name, and its metadata."""

    def __init__(self, path: Path) -> None:
        self._data: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        self._at = 8  # after the magic number and the version
        tensors, fields = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self._text()
            self.metadata[key] = self._value(self._number("I"))
        self._places = dict(self._place() for _ in range(tensors))
        alignment = self.metadata.get("general.alignment", 32)
        self._start = -(-self._at // alignment) * alignment

    def read(self, name: str) -> Array:
        """A tensor as float32; a matrix as [outputs, inputs].

        Raises:
            ValueError: it has a type that the demo's backbone does not have.
        """
        place = self._places[name]
        count, start = int(np.prod(place.shape)), self._start + place.offset
        if place.kind == _F32:
            return self._data[start : start + 4 * count].view("<f4").reshape(place.shape)
        if place.kind not in _BLOCK_BYTES:
            raise ValueError(f"{name} has the type {place.kind}")
        size = _BLOCK_BYTES[place.kind]
        blocks = self._data[start : start + count // _BLOCK * size].reshape(-1, size)
        values = _q4_1(blocks) if place.kind == _Q4_1 else _q8_0(blocks)
        return values.reshape(place.shape)

    def _place(self) -> tuple[str, _Place]:
        name = self._text()
        sizes = [self._number("Q") for _ in range(self._number("I"))]
        return name, _Place(tuple(reversed(sizes)), self._number("I"), self._number("Q"))

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _LIST:
            item, count = self._number("I"), self._number("Q")
            return [self._value(item) for _ in range(count)]
        return self._number(_NUMBERS[kind])

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data.data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        self._at += length
        return bytes(self._data[self._at - length : self._at]).decode()


def _half(column: npt.NDArray[np.uint8]) -> Array:
    """Two bytes a row as one float."""
    return np.ascontiguousarray(column).view("<f2").astype(np.float32)


def _q4_1(blocks: npt.NDArray[np.uint8]) -> Array:
    """A scale, a minimum, and 32 numbers of 4 bits: first those in the low halves of the bytes."""
    packed = blocks[:, 4:]
    levels = np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32)
    return _half(blocks[:, :2]) * levels + _half(blocks[:, 2:4])


def _q8_0(blocks: npt.NDArray[np.uint8]) -> Array:
    """A scale, and 32 numbers of 8 bits."""
    levels = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
    return levels * _half(blocks[:, :2])
