"""Rewrite the graph so that one pass over k tokens equals k steps bit for bit.

An ordinary pass over k tokens rounds differently from k steps: onnxruntime has another kernel for
matrices of one row (in attention's weighted sum and in the adapter slots). The last bit of a float
decides how an activation rounds to int8, and thirty layers turn a difference of 1e-7 into 0.5 in
the logits. Here attention and slots process each token separately. Products with constant weights,
nearly all of the work, process all tokens at once: their kernels compute each row independently.
"""

from __future__ import annotations

from collections.abc import Iterator

from dlp_edge.onnx_bytes.protobuf import Message, parts, read_message, text, texts, write_message
from dlp_edge.onnx_bytes.reader import GRAPH, INT32, INT64, MODEL, NODE, VALUE
from dlp_edge.onnx_bytes.writer import (
    MICROSOFT,
    Fields,
    encoded,
    make_attribute,
    make_constant,
    make_node,
)

_SIZES = "verify/sizes"  # of a Split's outputs: 1, 1, ...
_SHAPE = "verify/shape"  # [1, tokens, -1]
_LENGTHS = ("seqlens_k", "total_sequence_length")


def make_verify_graph(model: bytes, tokens: int) -> bytes:
    """A bundle's backbone -> the graph for exactly `tokens` tokens of one sequence.

    Inputs and outputs stay the same, except that `seqlens_k` and `total_sequence_length` refer to
    the first token, and that every token but the last has `present` outputs of its own
    (`present_after`). Bind these to the buffers of `past_key_values` and `present`.
    """
    message = read_message(memoryview(model), MODEL)
    graph = read_message(parts(message, 7)[0], GRAPH)
    graph_inputs = {text(read_message(value, VALUE), 1) for value in parts(graph, 11)}
    nodes: list[bytes | memoryview] = [*_lengths(tokens)]
    for part in parts(graph, 1):
        node = read_message(part, NODE)
        kind, inputs = text(node, 4), texts(node, 1)
        if kind == "GroupQueryAttention":
            nodes += _attention(node, tokens)
        elif kind in ("MatMul", "FusedMatMul") and inputs[1] in graph_inputs:
            nodes += _product(node)
        else:
            nodes.append(part)
    constants = [make_constant(f"verify/{token}", INT32, [], [token]) for token in range(tokens)]
    constants += [make_constant(_SIZES, INT64, [tokens], [1] * tokens)]
    constants += [make_constant(_SHAPE, INT64, [3], [1, tokens, -1])]
    outputs = [
        write_message({**value, 1: [present_after(text(value, 1), token).encode()]})
        for value in (read_message(part, VALUE) for part in parts(graph, 12))
        if text(value, 1).startswith("present.")
        for token in range(tokens - 1)
    ]
    changed: Fields = {1: nodes, 5: [*graph[5], *constants], 12: [*graph[12], *outputs]}
    return write_message({**message, 7: [write_message({**graph, **changed})]})


def present_after(name: str, token: int) -> str:
    """The name of the cache output `present.*` after a token that is not the last."""
    return f"{name}/{token}"


def _lengths(tokens: int) -> Iterator[bytes]:
    """Attention's two length inputs, for each token."""
    for token in range(tokens):
        for name in _LENGTHS:
            yield make_node("Add", [name, f"verify/{token}"], [f"{name}/{token}"])


def _attention(node: Message, tokens: int) -> Iterator[bytes]:
    """Attention token by token; each reads the cache that its predecessor wrote."""
    inputs, (result, *caches) = texts(node, 1), texts(node, 2)
    new = [name for name in inputs[:3] if name]  # queries, keys and values, packed or not
    for name in new:
        yield make_node(
            "Split", [name, _SIZES], [f"{name}/{token}" for token in range(tokens)], axis=1
        )
    for token in range(tokens):
        lengths = [f"{name}/{token}" for name in _LENGTHS]
        token_inputs = [name and f"{name}/{token}" for name in inputs[:3]]
        node_inputs = [*token_inputs, *inputs[3:5], *lengths, *inputs[7:]]
        last = token == tokens - 1
        inputs[3:5] = caches if last else [present_after(name, token) for name in caches]
        node_outputs = [f"{result}/out{token}", *inputs[3:5]]
        changed: Fields = {1: encoded(node_inputs), 2: encoded(node_outputs)}
        yield write_message({**node, **changed, 3: [f"{result}/{token}".encode()]})
    yield make_node("Concat", [f"{result}/out{token}" for token in range(tokens)], [result], axis=1)


def _product(node: Message) -> Iterator[bytes]:
    """x [1, S, m] times one of the slot's two matrices, as S one-row products."""
    (result,) = texts(node, 2)
    attributes = [*node.get(5, []), make_attribute("transBatchA", 1)]  # x as [S, 1, m]
    changed: Fields = {2: [f"{result}/rows".encode()], 4: [b"FusedMatMul"], 7: [MICROSOFT]}
    yield write_message({**node, **changed, 5: attributes})
    yield make_node("Reshape", [f"{result}/rows", _SHAPE], [result])
