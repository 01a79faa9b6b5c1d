"""The header of a safetensors file, read strictly before any tensor is.

The format is eight bytes (the header's length, little endian), the header in JSON, then the
tensors' bytes, side by side. The library's own check is the base; this one also wants every name
once, tensors without holes between them that end with the file, and no empty dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dlp_edge.untrusted.strict_json import parse

MAX_HEADER = 4 << 20
MAX_TENSORS = 20_000
MAX_RANK = 8
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}  # bytes of what we read


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header tells of it: `start` and `stop` count from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a header says."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def header_size(prefix: bytes, size: int) -> int:
    """The length of the JSON, of a file's first eight bytes and its size.

    Raises:
        ValueError: the file cannot have such a header.
    """
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError("its header is longer than the file or than any real one")
    return length


def parse_header(text: bytes, content: int) -> Header:
    """What a header says, checked.

    Args:
        text: the JSON.
        content: bytes that follow it in the file.

    Raises:
        ValueError: it is damaged, or does not describe exactly these bytes.
    """
    document = parse(text)
    if not isinstance(document, dict):
        raise ValueError("its header is no object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    if len(document) > MAX_TENSORS:
        raise ValueError(f"it has {len(document)} tensors")
    tensors = {name: _tensor(name, entry) for name, entry in document.items()}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start != end:
            kind = "overlaps the one before" if info.start < end else "leaves a hole before it"
            raise ValueError(f"tensor {name[:200]!r} {kind}")
        end = info.stop
    if end != content:
        raise ValueError(f"its tensors have {end} bytes, and {content} are there")
    return Header(tensors, metadata)


def _tensor(name: str, entry: Any) -> TensorInfo:
    where = f"tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} has no dtype, shape and data_offsets, or more than these")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{where} has the type {dtype!r}")
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"{where} has no shape")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} has no offsets")
    if 0 in shape:
        raise ValueError(f"{where} has an empty dimension")
    start, stop = offsets
    if stop - start != math.prod(shape) * SIZES[dtype]:
        raise ValueError(f"{where} has {stop - start} bytes for the shape {shape}")
    return TensorInfo(dtype, tuple(shape), start, stop)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def check_bytes(data: bytes) -> Header:
    """The header of a whole file in memory; see `parse_header`."""
    length = header_size(data[:8], len(data))
    return parse_header(data[8 : 8 + length], len(data) - 8 - length)
