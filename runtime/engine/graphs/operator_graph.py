"""Rewrite a backbone's graph for the custom operator `Linear` (`runtime/native/operators.c`).

`Linear` multiplies by a 4-bit or 8-bit matrix. It computes the block means of its input itself, so
the nodes that append them (see `export/quantisation/quantise.py`) go; it adds a slot's low-rank
product, so the slot's three nodes go. All slots share three inputs: the adapters as the bundle has
them, a table of the active adapters' rows, and their weights. Its scales may be in half
precision: fp32 scales are an eighth of a 4-bit matrix, and a token reads them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
_SLOT_INPUTS = {ADAPTERS: (FLOAT16, 1), SPANS: (INT64, 4), WEIGHTS: (FLOAT, 3)}  # dtype, rank
_MAX_PARTS = 3  # of a slot: q, k and v
_BLOCK = 32
_INT8_ACTIVATIONS = 4  # the accuracy_level that rounds activations to int8, as Linear does


@dataclass(frozen=True)
class Weight:
    """A weight of the rewritten graph.

    Attributes:
        source: the name of the bundle's weight with the same bytes.
        half: whether it is in half precision, other than in the bundle.
    """

    source: str
    shape: tuple[int, ...]
    half: bool = False


_Tensor = tuple[str, bytes | memoryview]  # Weight.source and the TensorProto's bytes


@dataclass(frozen=True)
class _Node:
    """A node of the graph.

    Attributes:
        data: the NodeProto's bytes.
        attributes: set only for nodes created here.
    """

    kind: str
    inputs: list[str]
    outputs: list[str]
    data: bytes
    attributes: dict[str, int | Sequence[int]] = field(default_factory=dict)


def with_operators(
    model: bytes, slots: Sequence[Slot], halve: Callable[[str], bool]
) -> tuple[bytes, dict[str, Weight]]:
    """Rewrite an int4 or int8 backbone to run on the custom operator.

    The inputs `<slot>.A` and `<slot>.B` give way to three inputs that all slots share: ADAPTERS [T]
    (fp16), SPANS [G, P, n, 3] (int64: the offsets of A and B in ADAPTERS, and the rank) and
    WEIGHTS [G, P, n] (fp32), for G sequences, P slot parts and n adapters.

    Returns:
        The graph's bytes, and its weights by name.

    Args:
        halve: whether the scales of this name shall be in half precision.

    Raises:
        ValueError, LookupError: it is not a graph that an export writes.
    """
    message = read_message(memoryview(model), MODEL)
    graph = read_message(parts(message, 7)[0], GRAPH)
    nodes = [_read(part) for part in parts(graph, 1)]
    producers = _producers(nodes)
    nodes = [_to_linear(node, producers) or node for node in nodes]
    tensors = {name: (name, part) for part in parts(graph, 5) if (name := _tensor_name(part))}
    nodes, views = _without_reshapes(nodes, tensors)
    nodes, halves = _with_half_scales(nodes, tensors, halve)
    outputs = [_name(value) for value in parts(graph, 12)]
    nodes = _reachable(_with_slots(nodes, slots), outputs)
    read = {name for node in nodes for name in node.inputs}
    kept = {name: tensor for name, tensor in (tensors | views | halves).items() if name in read}
    removed = {f"{slot.name}.{side}" for slot in slots for side in "AB"}
    inputs = [value for value in parts(graph, 11) if _name(value) not in removed]
    rewritten: Fields = {
        **graph,
        1: [node.data for node in nodes],
        5: [tensor for _, tensor in kept.values()],
        11: [*inputs, *(make_value(n, *_SLOT_INPUTS[n]) for n in _SLOT_INPUTS if slots)],
    }
    domains = [*message[8], make_opset(DOMAIN, 1)]
    data = write_message({**message, 7: [write_message(rewritten)], 8: domains})
    return data, {
        name: Weight(source, tuple(_shape(tensor)), name in halves)
        for name, (source, tensor) in kept.items()
    }


def _without_reshapes(
    nodes: Sequence[_Node], tensors: Mapping[str, _Tensor]
) -> tuple[list[_Node], dict[str, _Tensor]]:
    """Replace Reshape nodes over weights by tensors with the same bytes.

    The embedding reads a matrix of bytes [N, blocks, BLOCK] as [N, blocks * BLOCK]; onnxruntime
    would fold that Reshape into a second copy of the weight.

    Returns:
        The other nodes, and the new tensors by name.
    """
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


def _with_half_scales(
    nodes: Sequence[_Node], tensors: Mapping[str, _Tensor], halve: Callable[[str], bool]
) -> tuple[list[_Node], dict[str, _Tensor]]:
    """The nodes, where Linear reads scales in half precision, and those of these scales that are
    in single precision in the bundle (older exports)."""
    halves: dict[str, _Tensor] = {}
    producers = _producers(nodes)
    changed = []
    for node in nodes:
        if node.kind == "Linear":
            x, levels, scales, *zeros = node.inputs
            widened = producers.get(scales)
            if widened is not None and widened.kind == "Cast":
                scales = widened.inputs[0]
            elif scales in tensors and halve(scales):
                message = read_message(memoryview(tensors[scales][1]), TENSOR)
                name = f"{scales}.half"
                half: Fields = {**message, 2: [FLOAT16], 8: [name.encode()]}
                halves[name] = (scales, write_message(half))
                scales = name
            node = _linear_node([x, levels, scales, *zeros], node.outputs, **node.attributes)
        changed.append(node)
    return changed, halves


def _to_linear(node: _Node, producers: Mapping[str, _Node]) -> _Node | None:
    """The Linear node that replaces a MatMulNBits; None if Linear cannot."""
    if node.kind != "MatMulNBits" or len(node.inputs) > 4:
        return None
    attributes = _int_attributes(node)
    bits = attributes.get("bits", 4)
    int8 = (
        attributes.get("accuracy_level") == _INT8_ACTIVATIONS
        and attributes.get("block_size") == _BLOCK
    )
    if not int8 or bits not in (4, 8) or (bits == 8 and len(node.inputs) > 3):
        return None
    x, *weights = node.inputs
    source = _without_block_means(producers.get(x), producers)
    inputs = [source or x, *weights]
    return _linear_node(inputs, node.outputs, bits=bits, means=int(source is not None))


def _without_block_means(node: _Node | None, producers: Mapping[str, _Node]) -> str | None:
    """x, if the node appends block means to x; else None."""
    if node is None or node.kind != "Concat" or len(node.inputs) != 2:
        return None
    x, means = node.inputs
    mean = producers.get(means)
    if mean is None or mean.kind != "MatMul" or not mean.inputs[1].startswith("block_means"):
        return None
    return x


def _with_slots(nodes: Sequence[_Node], slots: Sequence[Slot]) -> list[_Node]:
    """Replace the Add that ends each slot by one Linear with the slot's inputs."""
    readers = {name: node for node in nodes for name in node.inputs}
    producers = _producers(nodes)
    replaced: dict[str, _Node] = {}  # by the name of the output
    first = 0
    for slot in slots:
        if len(slot.parts) > _MAX_PARTS:
            raise ValueError(f"the slot {slot.name} has {len(slot.parts)} parts")
        down = readers.get(f"{slot.name}.A")
        up = readers.get(f"{slot.name}.B")
        add = readers.get(up.outputs[0]) if up else None
        if not down or not up or not add or add.kind != "Add" or up.inputs[0] != down.outputs[0]:
            raise ValueError(f"the slot {slot.name} has unexpected nodes")
        layout: dict[str, int | Sequence[int]] = {
            "slot": 1,
            "first": first,
            "starts": [part.start for part in slot.parts],
            "columns": [part.stop - part.start for part in slot.parts],
        }
        base = producers[add.inputs[0]]
        if base.kind != "Linear" or base.inputs[0] != down.inputs[0]:
            raise ValueError(f"the slot {slot.name} does not belong to a quantised matrix")
        inputs = [*base.inputs, *[""] * (4 - len(base.inputs)), *_SLOT_INPUTS]
        replaced[add.outputs[0]] = _linear_node(inputs, add.outputs, **base.attributes, **layout)
        first += len(slot.parts)
    return [replaced.get(node.outputs[0], node) for node in nodes]


def slot_inputs(slots: Sequence[Slot]) -> set[str]:
    """The rewritten graph's inputs for its slots."""
    return set(_SLOT_INPUTS) if slots else set()


def _reachable(nodes: Sequence[_Node], outputs: Sequence[str]) -> list[_Node]:
    """The nodes that an output depends on."""
    wanted, kept = set(outputs), list[_Node]()
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _read(data: memoryview) -> _Node:
    message = read_message(data, NODE)
    return _Node(text(message, 4), texts(message, 1), texts(message, 2), bytes(data))


def _linear_node(inputs: list[str], outputs: list[str], **attributes: int | Sequence[int]) -> _Node:
    data = make_node("Linear", inputs, outputs, DOMAIN, **attributes)
    return _Node("Linear", inputs, outputs, data, attributes)


def _producers(nodes: Sequence[_Node]) -> dict[str, _Node]:
    """The node that produces each output, by the output's name."""
    return {name: node for node in nodes for name in node.outputs}


def _int_attributes(node: _Node) -> dict[str, int]:
    """The node's integer attributes."""
    message = read_message(memoryview(node.data), NODE)
    attributes = [read_message(part, ATTRIBUTE) for part in parts(message, 5)]
    return {text(entry, 1): varint(entry, 3) for entry in attributes if 3 in entry}


def _name(value: memoryview) -> str:
    return text(read_message(value, VALUE), 1)


def _tensor_name(tensor: memoryview) -> str:
    return text(read_message(tensor, TENSOR), 8)


def _shape(tensor: memoryview | bytes) -> list[int]:
    return varints(read_message(memoryview(tensor), TENSOR), 1)
