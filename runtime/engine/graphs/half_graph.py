"""Rewrite a backbone in single precision for a GPU that computes in half precision.

So one bundle serves the CPU and CUDA: the levels of quantised matrices are shared, and scales,
norms and caches become fp16 at load time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dlp_edge.bundle.weight_file import Weights
from dlp_edge.onnx_bytes.protobuf import parts, read_message, text, varint, write_message
from dlp_edge.onnx_bytes.reader import (
    ATTRIBUTE,
    FLOAT,
    FLOAT16,
    GRAPH,
    MODEL,
    NODE,
    TENSOR,
    TENSOR_TYPE,
    TYPE,
    VALUE,
)
from dlp_edge.onnx_bytes.writer import Fields, make_attribute


def half_graph(model: bytes) -> bytes:
    """The graph with fp16 in place of fp32; `half_weights` are its external weights."""
    message = read_message(memoryview(model), MODEL)
    graph = read_message(parts(message, 7)[0], GRAPH)
    changed: Fields = {
        1: [_node(part) for part in parts(graph, 1)],
        5: [_tensor(part) for part in parts(graph, 5)],
        11: [_value(part) for part in parts(graph, 11)],
        12: [_value(part) for part in parts(graph, 12)],
        13: [],  # the types of values in between
    }
    return write_message({**message, 7: [write_message({**graph, **changed})]})


def half_weights(weights: Weights) -> Weights:
    return {name: _half(weight) for name, weight in weights.items()}


def _node(part: memoryview) -> bytes | memoryview:
    """Casts and constants name a type."""
    node = read_message(part, NODE)
    if text(node, 4) not in ("Cast", "Constant", "MatMulNBits"):
        return part
    attributes = [_attribute(attribute) for attribute in parts(node, 5)]
    return write_message({**node, 5: [a for a in attributes if a is not None]})


def _attribute(part: memoryview) -> bytes | memoryview | None:
    attribute = read_message(part, ATTRIBUTE)
    name = text(attribute, 1)
    if name == "accuracy_level":  # rounds activations to int8, on a CPU only
        return None
    if name == "to" and varint(attribute, 3) == FLOAT:
        return make_attribute("to", FLOAT16)
    if name == "value" and 5 in attribute:
        return write_message({**attribute, 5: [_tensor(parts(attribute, 5)[0])]})
    return part


def _tensor(part: memoryview) -> bytes | memoryview:
    tensor = read_message(part, TENSOR)
    if varint(tensor, 2) != FLOAT:
        return part
    changed: Fields = {2: [FLOAT16]}
    if 9 in tensor:
        changed[9] = [_half(np.frombuffer(parts(tensor, 9)[0], "<f4")).tobytes()]
    return write_message({**tensor, **changed})


def _value(part: memoryview) -> bytes | memoryview:
    value = read_message(part, VALUE)
    kind = read_message(parts(value, 2)[0], TYPE)
    tensor = read_message(parts(kind, 1)[0], TENSOR_TYPE)
    if varint(tensor, 1) != FLOAT:
        return part
    half = write_message({**tensor, 1: [FLOAT16]})
    return write_message({**value, 2: [write_message({**kind, 1: [half]})]})


def _half(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(np.float16) if array.dtype == np.float32 else array
