"""Reads an ONNX graph without `onnx`, and refuses features that a bundle's graphs never use.

A graph controls C++ code in onnxruntime, so the reachable part is kept small: listed operators of
two domains, no subgraphs, functions or sparse tensors, and only dense tensors in one place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from dlp_edge.onnx_bytes.protobuf import (
    BYTES,
    FIXED32,
    VARINT,
    Field,
    Message,
    parts,
    read_message,
    text,
    texts,
    varint,
    varints,
)

MAX_NODES = 100_000
MAX_NAME = 1_000
MAX_RANK = 8
DOMAINS = ("", "com.microsoft")
ITEM_SIZES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2}  # ONNX data type -> bytes per element
FLOAT, UINT8, INT32, INT64, FLOAT16 = 1, 2, 6, 7, 10

_ONE, _ONE_NUMBER = Field(BYTES), Field(VARINT)
_MANY, _MANY_NUMBERS = Field(BYTES, True), Field(VARINT, True)

# The allowed fields of onnx.proto. Deliberately excluded: functions (25), training (20) and
# metadata (14) of a model; sparse tensors (15) and quantisation annotations (14) of a graph;
# graphs, tensor lists, types and references of an attribute; typed data of a tensor (only raw).
MODEL = {1: _ONE_NUMBER, 5: _ONE_NUMBER, 7: _ONE, 8: _MANY}
MODEL.update(dict.fromkeys((2, 3, 4, 6), _ONE))
_OPSET = {1: _ONE, 2: _ONE_NUMBER}
GRAPH = {1: _MANY, 2: _ONE, 5: _MANY, 10: _ONE, 11: _MANY, 12: _MANY, 13: _MANY}
NODE = {1: _MANY, 2: _MANY, 3: _ONE, 4: _ONE, 5: _MANY, 6: _ONE, 7: _ONE}
ATTRIBUTE = {1: _ONE, 2: Field(FIXED32), 3: _ONE_NUMBER, 4: _ONE, 5: _ONE, 8: _MANY_NUMBERS}
ATTRIBUTE.update({13: _ONE, 20: _ONE_NUMBER})
# Its type -> the fields with values of other types; onnxruntime reads the one that the type names.
_OTHER_VALUES = {
    kind: frozenset({2, 3, 4, 5, 8} - {own})
    for kind, own in ((1, 2), (2, 3), (3, 4), (4, 5), (7, 8))
}
TENSOR = {1: _MANY_NUMBERS, 2: _ONE_NUMBER, 8: _ONE, 9: _ONE, 12: _ONE}
TENSOR.update({13: _MANY, 14: _ONE_NUMBER})
_PAIR = {1: _ONE, 2: _ONE}
VALUE = {1: _ONE, 2: _ONE, 3: _ONE}
TYPE = {1: _ONE, 6: _ONE}
TENSOR_TYPE = {1: _ONE_NUMBER, 2: _ONE}
_SHAPE = {1: _MANY}
_DIMENSION = {1: _ONE_NUMBER, 2: _ONE, 3: _ONE}


@dataclass(frozen=True)
class Value:
    """An input or output of the graph; dynamic dimensions are None."""

    name: str
    dtype: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Tensor:
    """A constant of the graph: its bytes (`raw`), or its position in the external file."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    raw: memoryview | None
    offset: int = 0
    size: int = 0


class Node(NamedTuple):
    """An operator: its name without the domain, and its attributes that are integers or tensors."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor]

    def number(self, name: str, default: int = 0) -> int:
        """An attribute that is an integer."""
        return self.integers.get(name, (default,))[0]

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """An attribute that is a list of integers; None if it is missing."""
        return self.integers.get(name)


_Named = TypeVar("_Named", Value, Tensor)


@dataclass(frozen=True)
class Graph:
    """A graph's inputs, outputs and constants, by name, and its nodes in order."""

    inputs: dict[str, Value]
    outputs: dict[str, Value]
    tensors: dict[str, Tensor]
    nodes: tuple[Node, ...]


def read_graph(
    data: bytes, operators: Collection[str], external: str | None, external_size: int = 0
) -> Graph:
    """Parses and checks an ONNX file.

    Args:
        operators: the allowed operators, as "Op" or "domain.Op".
        external: name of the one external data file allowed; None for none.
        external_size: its size in bytes.

    Raises:
        ValueError: it is malformed, or uses a feature that is not allowed.
    """
    model = read_message(memoryview(data), MODEL)
    for entry in parts(model, 8):
        domain = text(read_message(entry, _OPSET), 1)
        if domain not in DOMAINS:
            raise ValueError(f"operators of the domain {domain[:100]!r} are not allowed")
    graphs = parts(model, 7)
    if not graphs:
        raise ValueError("there is no graph")
    graph = read_message(graphs[0], GRAPH)
    nodes = parts(graph, 1)
    if len(nodes) > MAX_NODES:
        raise ValueError(f"{len(nodes)} nodes, the limit is {MAX_NODES}")
    read = tuple(_node(node, operators) for node in nodes)
    tensors = [_tensor(part, external, external_size) for part in parts(graph, 5)]
    _check_places(tensors)
    return Graph(
        {value.name: value for value in _unique([_value(part) for part in parts(graph, 11)])},
        {value.name: value for value in _unique([_value(part) for part in parts(graph, 12)])},
        {tensor.name: tensor for tensor in _unique(tensors)},
        read,
    )


def _node(data: memoryview, operators: Collection[str]) -> Node:
    node = read_message(data, NODE)
    domain, kind = text(node, 7), text(node, 4)
    operator = f"{domain}.{kind}" if domain else kind
    if operator not in operators:
        raise ValueError(f"the operator {operator[:100]!r} is not allowed")
    inputs, outputs = tuple(texts(node, 1)), tuple(texts(node, 2))
    if max(map(len, (*inputs, *outputs)), default=0) > MAX_NAME:
        raise ValueError(f"a name is longer than {MAX_NAME} characters")
    integers: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, Tensor] = {}
    attributes = parts(node, 5)
    if kind == "Constant" and len(attributes) != 1:  # onnxruntime would take the first
        raise ValueError("a Constant must have one attribute")
    for part in attributes:
        attribute = read_message(part, ATTRIBUTE)
        name, others = text(attribute, 1), _OTHER_VALUES.get(varint(attribute, 20))
        if others is None or attribute.keys() & others:
            raise ValueError(f"the attribute {name[:100]!r} has another type than its value")
        if name in integers or name in tensors:
            raise ValueError(f"the attribute {name[:100]!r} is given twice")
        for tensor in parts(attribute, 5):
            tensors[name] = _tensor(tensor, None, 0)
        if 3 in attribute or 8 in attribute:
            integers[name] = (
                (varint(attribute, 3),) if 3 in attribute else tuple(varints(attribute, 8))
            )
    return Node(kind, inputs, outputs, integers, tensors)


def _tensor(data: memoryview, external: str | None, external_size: int) -> Tensor:
    message = read_message(data, TENSOR)
    name, dtype = text(message, 8), varint(message, 2)
    shape = tuple(varints(message, 1))
    where = f"tensor {name[:200]!r}"
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{where} has the unsupported type {dtype}")
    if len(shape) > MAX_RANK or any(not 0 <= size < 1 << 40 for size in shape):
        raise ValueError(f"{where} has an invalid shape")
    needed = math.prod(shape) * ITEM_SIZES[dtype]
    raw = parts(message, 9)
    if varint(message, 14) == 0:
        if parts(message, 13):
            raise ValueError(f"{where} must be either inline or external")
        size = len(raw[0]) if raw else 0
        if size != needed:
            raise ValueError(
                f"{where} has {size} bytes, which does not match the shape {list(shape)}"
            )
        return Tensor(name, dtype, shape, raw[0] if raw else memoryview(b""))
    if raw or varint(message, 14) != 1:
        raise ValueError(f"{where} must be either inline or external")
    offset, size = _place(message, where, external)
    if size != needed or offset + size > external_size:
        raise ValueError(f"{where} does not lie within {external}")
    return Tensor(name, dtype, shape, None, offset, size)


def _place(message: Message, where: str, external: str | None) -> tuple[int, int]:
    """Returns a tensor's offset and length in the external file."""
    entries = [read_message(part, _PAIR) for part in parts(message, 13)]
    place = {text(entry, 1): text(entry, 2) for entry in entries}
    if len(place) != len(entries) or not place.keys() <= {"location", "offset", "length"}:
        raise ValueError(f"{where} has an invalid external location")
    if external is None or place.get("location") != external:
        raise ValueError(f"{where} refers to the file {place.get('location', '')[:200]!r}")
    numbers = [place.get("offset", "0"), place.get("length", "")]
    if not all(number.isascii() and number.isdigit() and len(number) < 16 for number in numbers):
        raise ValueError(f"{where} has an invalid external location")
    return int(numbers[0]), int(numbers[1])


def _check_places(tensors: list[Tensor]) -> None:
    """Raises ValueError if tensors share bytes: a small file could then exhaust memory."""
    end = 0
    external = [tensor for tensor in tensors if tensor.raw is None]
    for tensor in sorted(external, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise ValueError(f"tensor {tensor.name[:200]!r} overlaps the previous one")
        end = tensor.offset + tensor.size


def _value(data: memoryview) -> Value:
    message = read_message(data, VALUE)
    name = text(message, 1)
    kinds = [read_message(part, TYPE) for part in parts(message, 2)]
    types = [read_message(part, TENSOR_TYPE) for kind in kinds for part in parts(kind, 1)]
    if len(types) != 1 or not parts(types[0], 2):
        raise ValueError(f"{name[:200]!r} is not a tensor of known rank")
    dimensions = parts(read_message(parts(types[0], 2)[0], _SHAPE), 1)
    return Value(name, varint(types[0], 1), tuple(_dimension(part) for part in dimensions))


def _dimension(data: memoryview) -> int | None:
    message = read_message(data, _DIMENSION)
    if (
        len(text(message, 2)) > MAX_NAME
    ):  # `text` also refuses invalid UTF-8, on which onnxruntime fails
        raise ValueError(f"a name is longer than {MAX_NAME} characters")
    return varint(message, 1) if 1 in message else None


def _unique(items: Sequence[_Named]) -> Sequence[_Named]:
    """Returns the items. Raises ValueError for duplicate names."""
    if len({item.name for item in items}) != len(items):
        raise ValueError("two inputs, outputs or tensors share a name")
    return items
