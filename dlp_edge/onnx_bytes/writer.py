"""Builds ONNX messages as bytes, to create or edit graphs without `onnx`."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from dlp_edge.onnx_bytes.protobuf import Value, write_message
from dlp_edge.onnx_bytes.reader import INT32, INT64

Fields = dict[int, Sequence[Value | bytes]]

MICROSOFT = b"com.microsoft"  # the domain of onnxruntime's operators
_IR_VERSION, _OPSET = 10, 21  # of the models made here
_INT_ATTRIBUTE, _INTS_ATTRIBUTE = 2, 7
_INTS = {INT32: "i", INT64: "q"}


def make_node(
    kind: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    domain: str = "",
    **numbers: int | Sequence[int],
) -> bytes:
    """Builds a NodeProto; `numbers` are its attributes. The default domain is ONNX's own."""
    attributes = [make_attribute(name, number) for name, number in numbers.items()]
    return write_message(
        {
            1: encoded(inputs),
            2: encoded(outputs),
            4: [kind.encode()],
            5: attributes,
            7: [domain.encode()],
        }
    )


def make_attribute(name: str, number: int | Sequence[int]) -> bytes:
    """Builds an AttributeProto."""
    if isinstance(number, int):
        return write_message({1: [name.encode()], 3: [number], 20: [_INT_ATTRIBUTE]})
    return write_message({1: [name.encode()], 8: list(number), 20: [_INTS_ATTRIBUTE]})


def make_opset(domain: str, version: int) -> bytes:
    """Builds an OperatorSetIdProto: an operator domain and its version."""
    return write_message({1: [domain.encode()], 2: [version]})


def make_constant(name: str, dtype: int, shape: Sequence[int], values: Sequence[int]) -> bytes:
    """Builds a TensorProto of INT32 or INT64."""
    raw = struct.pack(f"<{len(values)}{_INTS[dtype]}", *values)
    return write_message({1: list(shape), 2: [dtype], 8: [name.encode()], 9: [raw]})


def make_value(name: str, dtype: int, rank: int) -> bytes:
    """Builds a ValueInfoProto of a tensor with only dynamic dimensions."""
    shape = write_message(
        {1: [write_message({2: [f"{name}/{axis}".encode()]}) for axis in range(rank)]}
    )
    tensor = write_message({1: [dtype], 2: [shape]})
    return write_message({1: [name.encode()], 2: [write_message({1: [tensor]})]})


def make_model(
    nodes: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    domains: Sequence[str] = (),
) -> bytes:
    """Builds a ModelProto without weights; `domains` lists operator domains besides ONNX's own."""
    graph = write_message({1: nodes, 2: [b"graph"], 11: inputs, 12: outputs})
    return write_message(
        {
            1: [_IR_VERSION],
            7: [graph],
            8: [make_opset("", _OPSET), *(make_opset(domain, 1) for domain in domains)],
        }
    )


def encoded(names: Sequence[str]) -> list[bytes]:
    return [name.encode() for name in names]


def gather_and_scale(dtype: int) -> bytes:
    """Builds the model fused_A = A[:, rows], fused_B = B[:, rows] * weights.

    A and B are [L, R, n], rows is [G, rho] int64 and weights is [G, rho, 1].
    """
    return make_model(
        [
            make_node("Gather", ["A", "rows"], ["fused_A"], axis=1),
            make_node("Gather", ["B", "rows"], ["rows_of_B"], axis=1),
            make_node("Mul", ["rows_of_B", "weights"], ["fused_B"]),
        ],
        [
            make_value("A", dtype, 3),
            make_value("B", dtype, 3),
            make_value("rows", INT64, 2),
            make_value("weights", dtype, 3),
        ],
        [make_value("fused_A", dtype, 4), make_value("fused_B", dtype, 4)],
    )
