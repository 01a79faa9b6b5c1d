"""A backbone's graph, rewritten for our own operator (`runtime/native/operators.c`).

`Linear` multiplies by a matrix of 4 or 8 bits. The nodes that append block means to its input (see
`export/quantisation/quantise.py`) are no longer needed, since it takes the means itself, nor are
the three nodes of a slot. All slots share their inputs: the numbers of all adapters, as they lie in
the bundle, and a table of which rows of them are in force, and with what weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dlp_edge.bundle.manifest import Slot
from dlp_edge.onnx_bytes.protobuf import (
    parts,
    read_message,
    text,
    texts,
    varint,
    varints,
    write_message,
)
from dlp_edge.onnx_bytes.reader import (
    ATTRIBUTE,
    FLOAT,
    FLOAT16,
    GRAPH,
    INT64,
    MODEL,
    NODE,
    TENSOR,
    VALUE,
)
from dlp_edge.onnx_bytes.writer import Fields, make_node, make_opset, make_value
from dlp_edge.runtime.engine.operators import DOMAIN

ADAPTERS, SPANS, WEIGHTS = "fusion.adapters", "fusion.spans", "fusion.weights"
_SLOT_INPUTS = {ADAPTERS: (FLOAT16, 1), SPANS: (INT64, 4), WEIGHTS: (FLOAT, 3)}  # type, rank
_MOST_PARTS = 3  # of a slot: q, k and v
_BLOCK = 32
_FAST = 4  # the accuracy level that rounds activations to int8, as Linear does


@dataclass(frozen=True)
class Weight:
    """A weight of the rewritten graph: the bundle's that it is, in this shape."""

    source: str
    shape: tuple[int, ...]


_Tensor = tuple[str, bytes | memoryview]  # the weight of the bundle that it is, and its bytes


@dataclass(frozen=True)
class _Node:
    """A node of the graph, and its bytes.

    Attributes:
        numbers: its attributes, of a node that was written here.
    """

    kind: str
    inputs: list[str]
    outputs: list[str]
    data: bytes
    numbers: dict[str, int | Sequence[int]] = field(default_factory=dict)


def with_operators(model: bytes, slots: Sequence[Slot]) -> tuple[bytes, dict[str, Weight]]:
    """A backbone in int4 or int8 as a bundle has it -> the same one on our operator, and by their
    names the weights that it has.

    Instead of `<slot>.A` and `<slot>.B` it has three inputs for all slots together: ADAPTERS [T]
    (fp16), SPANS [G, P, n, 3] (int64: where A's and B's rows begin in ADAPTERS, and the rank) and
    WEIGHTS [G, P, n], for G sequences, P parts of slots and n adapters.

    Raises:
        ValueError, LookupError: it has other nodes than those that an export writes.
    """
    message = read_message(memoryview(model), MODEL)
    graph = read_message(parts(message, 7)[0], GRAPH)
    nodes = [_read(part) for part in parts(graph, 1)]
    made_by = _makers(nodes)
    nodes = [_linear(node, made_by) or node for node in nodes]
    tensors = {name: (name, part) for part in parts(graph, 5) if (name := _tensor_name(part))}
    nodes, views = _without_reshapes(nodes, tensors)
    outputs = [_name(value) for value in parts(graph, 12)]
    changed = _needed(_with_slots(nodes, slots), outputs)
    read = {name for node in changed for name in node.inputs}
    kept = {name: found for name, found in {**tensors, **views}.items() if name in read}
    gone = {f"{slot.name}.{side}" for slot in slots for side in "AB"}
    inputs = [value for value in parts(graph, 11) if _name(value) not in gone]
    rewritten: Fields = {
        **graph,
        1: [node.data for node in changed],
        5: [tensor for _, tensor in kept.values()],
        11: [*inputs, *(make_value(n, *_SLOT_INPUTS[n]) for n in _SLOT_INPUTS if slots)],
    }
    domains = [*message[8], make_opset(DOMAIN, 1)]
    found = write_message({**message, 7: [write_message(rewritten)], 8: domains})
    return found, {
        name: Weight(source, tuple(_shape(tensor))) for name, (source, tensor) in kept.items()
    }


def _without_reshapes(
    nodes: Sequence[_Node], tensors: Mapping[str, _Tensor]
) -> tuple[list[_Node], dict[str, _Tensor]]:
    """The nodes without those that give the embedding a matrix [N, blocks, BLOCK] of bytes as
    [N, blocks * BLOCK], and in their place tensors over the same bytes: onnxruntime would compute
    them in advance, from the file, and keep them."""
    views: dict[str, _Tensor] = {}
    kept = []
    for node in nodes:
        if node.kind == "Reshape" and node.inputs[0] in tensors:
            source, (name,) = node.inputs[0], node.outputs
            message = read_message(memoryview(tensors[source][1]), TENSOR)
            rows, *sizes = varints(message, 1)
            view: Fields = {**message, 1: [rows, math.prod(sizes)], 8: [name.encode()]}
            views[name] = (source, write_message(view))
        else:
            kept.append(node)
    return kept, views


def _linear(node: _Node, made_by: Mapping[str, _Node]) -> _Node | None:
    """Linear instead of a MatMulNBits that it can do."""
    if node.kind != "MatMulNBits" or len(node.inputs) > 4:
        return None
    numbers = _numbers(node)
    bits = numbers.get("bits", 4)
    fast = numbers.get("accuracy_level") == _FAST and numbers.get("block_size") == _BLOCK
    if not fast or bits not in (4, 8) or (bits == 8 and len(node.inputs) > 3):
        return None
    x, *weights = node.inputs
    extended = _input_of_means(made_by.get(x), made_by)
    inputs = [extended or x, *weights]
    return _linear_node(inputs, node.outputs, bits=bits, means=int(extended is not None))


def _input_of_means(node: _Node | None, made_by: Mapping[str, _Node]) -> str | None:
    """x, of a node that appends its block means to it."""
    if node is None or node.kind != "Concat" or len(node.inputs) != 2:
        return None
    x, means = node.inputs
    before = made_by.get(means)
    if before is None or before.kind != "MatMul" or not before.inputs[1].startswith("block_means"):
        return None
    return x


def _with_slots(nodes: Sequence[_Node], slots: Sequence[Slot]) -> list[_Node]:
    """The nodes, with one node instead of the addition that ends a slot."""
    readers = {name: node for node in nodes for name in node.inputs}
    made_by = _makers(nodes)
    made: dict[str, _Node] = {}  # by the output that they make
    first = 0
    for slot in slots:
        if len(slot.parts) > _MOST_PARTS:
            raise ValueError(f"the slot {slot.name} has {len(slot.parts)} parts")
        down = readers.get(f"{slot.name}.A")
        up = readers.get(f"{slot.name}.B")
        add = readers.get(up.outputs[0]) if up else None
        if not down or not up or not add or add.kind != "Add" or up.inputs[0] != down.outputs[0]:
            raise ValueError(f"the slot {slot.name} has other nodes than an export writes")
        places: dict[str, int | Sequence[int]] = {
            "slot": 1,
            "first": first,
            "starts": [part.start for part in slot.parts],
            "columns": [part.stop - part.start for part in slot.parts],
        }
        base = made_by[add.inputs[0]]
        if base.kind != "Linear" or base.inputs[0] != down.inputs[0]:
            raise ValueError(f"the slot {slot.name} is not that of a quantised matrix")
        inputs = [*base.inputs, *[""] * (4 - len(base.inputs)), *_SLOT_INPUTS]
        made[add.outputs[0]] = _linear_node(inputs, add.outputs, **base.numbers, **places)
        first += len(slot.parts)
    return [made.get(node.outputs[0], node) for node in nodes]


def slot_inputs(slots: Sequence[Slot]) -> set[str]:
    """The inputs that the rewritten graph has for its slots."""
    return set(_SLOT_INPUTS) if slots else set()


def _needed(nodes: Sequence[_Node], outputs: Sequence[str]) -> list[_Node]:
    """The nodes without those that no output needs any more."""
    wanted, kept = set(outputs), list[_Node]()
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _read(data: memoryview) -> _Node:
    message = read_message(data, NODE)
    return _Node(text(message, 4), texts(message, 1), texts(message, 2), bytes(data))


def _linear_node(inputs: list[str], outputs: list[str], **numbers: int | Sequence[int]) -> _Node:
    data = make_node("Linear", inputs, outputs, DOMAIN, **numbers)
    return _Node("Linear", inputs, outputs, data, numbers)


def _makers(nodes: Sequence[_Node]) -> dict[str, _Node]:
    """For each output the node that makes it."""
    return {name: node for node in nodes for name in node.outputs}


def _numbers(node: _Node) -> dict[str, int]:
    """Its attributes that are whole numbers."""
    message = read_message(memoryview(node.data), NODE)
    attributes = [read_message(part, ATTRIBUTE) for part in parts(message, 5)]
    return {text(found, 1): varint(found, 3) for found in attributes if 3 in found}


def _name(value: memoryview) -> str:
    return text(read_message(value, VALUE), 1)


def _tensor_name(tensor: memoryview) -> str:
    return text(read_message(tensor, TENSOR), 8)


def _shape(tensor: memoryview | bytes) -> list[int]:
    return varints(read_message(memoryview(tensor), TENSOR), 1)
