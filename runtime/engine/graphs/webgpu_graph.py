"""Rewrite a backbone's graph for the WebGPU provider.

It has no FusedMatMul, which multiplies by a slot's A; two nodes do the same. Its MatMulNBits may
round activations to int8 at the bundle's accuracy_level; without one it computes in the graph's
type.
"""

from __future__ import annotations

from collections.abc import Iterator

from dlp_edge.onnx_bytes.protobuf import (
    Message,
    parts,
    read_message,
    text,
    texts,
    write_message,
)
from dlp_edge.onnx_bytes.reader import ATTRIBUTE, GRAPH, MODEL, NODE
from dlp_edge.onnx_bytes.writer import make_node

_PERMUTATION = [0, 2, 1]  # of a slot's A [G, rho, h]


def for_webgpu(model: bytes) -> bytes:
    """A bundle's backbone with the nodes that the WebGPU provider has."""
    message = read_message(memoryview(model), MODEL)
    graph = read_message(parts(message, 7)[0], GRAPH)
    nodes: list[bytes | memoryview] = []
    for part in parts(graph, 1):
        node = read_message(part, NODE)
        kind = text(node, 4)
        if kind == "FusedMatMul":
            nodes += _two_nodes(node)
        elif kind == "MatMulNBits":
            kept = [a for a in parts(node, 5) if _name(a) != "accuracy_level"]
            nodes.append(write_message({**node, 5: kept}))
        else:
            nodes.append(part)
    return write_message({**message, 7: [write_message({**graph, 1: nodes})]})


def _two_nodes(node: Message) -> Iterator[bytes]:
    """x times a transposed matrix (transB, the one attribute that an export writes)."""
    (x, matrix), (result,) = texts(node, 1), texts(node, 2)
    yield make_node("Transpose", [matrix], [f"{result}/matrix"], perm=_PERMUTATION)
    yield make_node("MatMul", [x, f"{result}/matrix"], [result])


def _name(attribute: memoryview | bytes) -> str:
    return text(read_message(memoryview(attribute), ATTRIBUTE), 1)
