"""Parses and checks the header of a safetensors file before any tensor is read.

The format: eight bytes (the header's length, little endian), the header as JSON, then the tensors'
bytes. Stricter than the library: no duplicate names, no gaps between tensors or after the last
one, and no empty dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dlp_edge.untrusted.strict_json import parse

MAX_HEADER = 4 << 20
MAX_TENSORS = 20_000
MAX_RANK = 8
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
}  # bytes per element of the supported types


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as described by the header; `start` and `stop` are offsets from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A parsed header."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def header_size(prefix: bytes, size: int) -> int:
    """Returns the length of the header's JSON.

    Args:
        prefix: the first eight bytes of the file.
        size: the file's size in bytes.

    Raises:
        ValueError: the length exceeds the file or MAX_HEADER.
    """
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError("the header is truncated or too long")
    return length


def parse_header(text: bytes, content: int) -> Header:
    """Parses a header.

    Args:
        text: the JSON.
        content: number of bytes that follow it in the file.

    Raises:
        ValueError: the header is malformed, or does not describe exactly these bytes.
    """
    document = parse(text)
    if not isinstance(document, dict):
        raise ValueError("the header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the metadata does not map strings to strings")
    if len(document) > MAX_TENSORS:
        raise ValueError(f"{len(document)} tensors, the limit is {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry) for name, entry in document.items()}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start != end:
            problem = "overlaps the previous one" if info.start < end else "is preceded by a gap"
            raise ValueError(f"tensor {name[:200]!r} {problem}")
        end = info.stop
    if end != content:
        raise ValueError(f"the tensors take {end} bytes, the file has {content}")
    return Header(tensors, metadata)


def _tensor(name: str, entry: Any) -> TensorInfo:
    where = f"tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{where} has the unsupported type {dtype!r}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"{where} has an invalid shape")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has invalid offsets")
    if 0 in shape:
        raise ValueError(f"{where} has an empty dimension")
    start, stop = offsets
    if stop - start != math.prod(shape) * SIZES[dtype]:
        raise ValueError(
            f"{where} has {stop - start} bytes, which does not match the shape {shape}"
        )
    return TensorInfo(dtype, tuple(shape), start, stop)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def check_bytes(data: bytes) -> Header:
    """Parses the header of a file in memory; see `parse_header`."""
    length = header_size(data[:8], len(data))
    return parse_header(data[8 : 8 + length], len(data) - 8 - length)
