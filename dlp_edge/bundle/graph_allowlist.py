"""Validates a bundle's two graphs: allowed operators, the inputs and outputs expected, and that a
pass costs no more than the sizes in the manifest account for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from dlp_edge.bundle.manifest import BackboneEntry, RouterEntry
from dlp_edge.onnx_bytes.costs import Cost, cost_of
from dlp_edge.onnx_bytes.reader import FLOAT, FLOAT16, INT32, INT64, Graph, Value, read_graph
from dlp_edge.onnx_bytes.shape_rules import Shape

# Every operator that exports use, over all model families, formats and targets.
BACKBONE_OPERATORS = frozenset(
    "Add Cast Concat Constant Div Gather Gelu GreaterOrEqual MatMul Max Min Mul Reshape Sigmoid"
    " SimplifiedLayerNormalization Split Sub Tanh Transpose Unsqueeze Where".split()
    + [
        f"com.microsoft.{name}"
        for name in "FusedMatMul GatherBlockQuantized GroupQueryAttention MatMulBnb4 MatMulNBits"
        " SkipSimplifiedLayerNormalization".split()
    ]
)
ROUTER_OPERATORS = {
    "mlp": frozenset(
        "Add Cast Concat CumSum Div Equal Flatten Gather Gemm LayerNormalization MatMul Max Mul"
        " Pad ReduceMax ReduceSum Relu Slice Softmax Squeeze Transpose Unsqueeze".split()
    ),
    "albert": frozenset(
        "Add And Cast Concat Constant ConstantOfShape CumSum Div Equal Erf Expand Flatten Gather"
        " Gemm Greater GreaterOrEqual Identity LayerNormalization MatMul Mul Pow Range ReduceMean"
        " Reshape Shape Slice Softmax Sqrt Sub Tanh Transpose Unsqueeze Where".split()
    ),
}
SPLITTER_OPERATORS = frozenset(
    "Add Cast Concat Gather LayerNormalization MatMul Pad Relu Slice".split()
)
MAX_PADDING = 1 << 20  # after the last tensor of the weight file
# Nodes. Exports write 22 a layer, and up to 47 in other families; 282 for two layers of ALBERT.
MAX_NODES = {"mlp": 500, "albert": 4_000}
BACKBONE_NODES, LAYER_NODES = 200, 100
# What a pass may cost beside what the weights account for.
_FREE_BYTES = 64 << 20
_FREE_PRODUCTS = 2 << 30
_BYTES_OVER_WEIGHTS = 3  # a tied head of fp32 is transposed once, and kept
_ROUTER_BYTES_OVER_WEIGHTS = 4
_PRODUCTS_OVER_BYTES = 4  # of weights, for each token: two are 4 bits each, and a head may be tied
# ALBERT base has 34 billion for MAX_ROUTER_TOKENS.
_ROUTER_PRODUCTS = {"mlp": 1 << 30, "albert": 36 << 30}
MAX_ROUTER_TOKENS = 256
_ROUTER_TOKENS = (1, 4, 16, 64, MAX_ROUTER_TOKENS)
_SPLITTER_NODES, _SPLITTER_TOKENS, _SPLITTER_PRODUCTS = 500, 1024, 3 << 30
_CHUNK, _POSITIONS = 512, 64  # tokens of a prefill, and positions whose logits are asked for
_FLOATS = {"float32": FLOAT, "float16": FLOAT16}
_NUMPY_FLOATS: dict[int, np.dtype[Any]] = {FLOAT: np.dtype("<f4"), FLOAT16: np.dtype("<f2")}

CheckLength = Callable[[int], None]
"""Raises ValueError if a pass of a router's graph with this number of tokens costs too much."""

# None matches any dimension.
_Shape = tuple[int | None, ...]


def check_backbone(
    data: bytes, entry: BackboneEntry, external: str, external_size: int, rank: int
) -> Graph:
    """Reads and checks the backbone's graph.

    Args:
        external: the name of its weight file.
        external_size: size of that file in bytes.
        rank: the sum of the adapters' ranks.

    Raises:
        ValueError: it is damaged, uses an operator that is not allowed, or contradicts the
            manifest.
    """
    graph = read_graph(data, BACKBONE_OPERATORS, external, external_size)
    inputs, outputs = _backbone_values(entry)
    _compare(graph.inputs, inputs, "input")
    _compare(graph.outputs, outputs, "output")
    end = max((t.offset + t.size for t in graph.tensors.values() if t.raw is None), default=0)
    if external_size - end > MAX_PADDING:
        raise ValueError(f"{external} has {external_size - end} unused bytes")
    if graph.inputs.keys() & graph.tensors.keys():
        raise ValueError("a graph input is also a constant")
    _check_nodes(graph, BACKBONE_NODES + LAYER_NODES * entry.num_layers)
    attentions = sum(node.kind == "GroupQueryAttention" for node in graph.nodes)
    if attentions > entry.num_layers:  # what one takes grows with the context
        raise ValueError(f"{attentions} attentions in {entry.num_layers} layers")
    cost = cost_of(graph, _largest_inputs(entry, rank))
    weights = len(data) + external_size
    slots = rank * sum(slot.input_size + slot.output_size for slot in entry.slots)
    _check_cost(
        cost,
        _FREE_BYTES + _BYTES_OVER_WEIGHTS * weights,
        _FREE_PRODUCTS + _CHUNK * (_PRODUCTS_OVER_BYTES * weights + slots),
    )
    return graph


def _largest_inputs(entry: BackboneEntry, rank: int) -> dict[str, Shape]:
    """The inputs of a prefill. The caches count as one token: they are not the graph's to size."""
    inputs: dict[str, Shape] = {
        "input_ids": (1, _CHUNK),
        "logit_positions": (_POSITIONS,),
        "seqlens_k": (1,),
        "total_sequence_length": (),
    }
    for slot in entry.slots:
        inputs[f"{slot.name}.A"] = (1, max(1, rank), slot.input_size)
        inputs[f"{slot.name}.B"] = (1, max(1, rank), slot.output_size)
    for layer in range(entry.num_layers):
        for side in ("key", "value"):
            name = f"past_key_values.{layer}.{side}"
            inputs[name] = (1, entry.num_kv_heads, 1, entry.head_size)
    return inputs


def _check_nodes(graph: Graph, limit: int) -> None:
    if len(graph.nodes) > limit:
        raise ValueError(f"{len(graph.nodes)} nodes, the limit is {limit}")


def _check_cost(cost: Cost, most_bytes: int, products: int) -> None:
    if cost.bytes > most_bytes:
        raise ValueError(f"a pass takes {cost.bytes} bytes, the limit is {most_bytes}")
    if cost.products > products:
        raise ValueError(f"a pass takes {cost.products} products, the limit is {products}")


def _backbone_values(
    entry: BackboneEntry,
) -> tuple[dict[str, tuple[int, _Shape]], dict[str, tuple[int, _Shape]]]:
    """Returns the expected inputs and outputs, each as name -> (type, shape)."""
    kind = _FLOATS[entry.dtype]
    inputs: dict[str, tuple[int, _Shape]] = {
        "input_ids": (INT64, (None, None)),
        "logit_positions": (INT64, (None,)),
        "seqlens_k": (INT32, (None,)),
        "total_sequence_length": (INT32, ()),
    }
    for slot in entry.slots:
        inputs[f"{slot.name}.A"] = (kind, (None, None, slot.input_size))
        inputs[f"{slot.name}.B"] = (kind, (None, None, slot.output_size))
    outputs: dict[str, tuple[int, _Shape]] = {"logits": (kind, (None, None, entry.vocab_size))}
    cache: _Shape = (None, entry.num_kv_heads, None, entry.head_size)
    for layer in range(entry.num_layers):
        for side in ("key", "value"):
            inputs[f"past_key_values.{layer}.{side}"] = (kind, cache)
            outputs[f"present.{layer}.{side}"] = (kind, cache)
    return inputs, outputs


def check_router(data: bytes, entry: RouterEntry) -> tuple[int, CheckLength]:
    """Reads and checks the router's graph.

    Returns:
        Its number of features, and a check to be made before a pass of a number of tokens.

    Raises:
        ValueError: as for `check_backbone`, or a weight is not finite.
    """
    graph = read_graph(data, ROUTER_OPERATORS[entry.architecture], None)
    _compare(graph.inputs, {"input_ids": (INT64, (None, None))}, "input")
    _compare(graph.outputs, {"features": (FLOAT, (None, None))}, "output")
    _check_finite(graph)
    width = graph.outputs["features"].shape[1]
    if width is None:
        raise ValueError("the number of features is not fixed")
    _check_nodes(graph, MAX_NODES[entry.architecture])
    # Without a Shape node, the largest input is the most expensive one. With one, a graph may do
    # at one length what it does at no other.
    follows_shapes = any(node.kind == "Shape" for node in graph.nodes)

    @cache
    def check_length(tokens: int) -> None:
        _check_cost(
            cost_of(graph, {"input_ids": (1, tokens)}),
            _FREE_BYTES + _ROUTER_BYTES_OVER_WEIGHTS * len(data),
            _ROUTER_PRODUCTS[entry.architecture],
        )

    for tokens in _ROUTER_TOKENS if follows_shapes else _ROUTER_TOKENS[-1:]:
        check_length(tokens)
    return width, check_length if follows_shapes else _no_check


def _no_check(tokens: int) -> None:
    """For a graph that costs most at the largest length."""


def check_splitter(data: bytes) -> None:
    """Reads and checks the request splitter's graph.

    Raises:
        ValueError: as for `check_router`.
    """
    graph = read_graph(data, SPLITTER_OPERATORS, None)
    values = (INT64, (None, None))
    _compare(graph.inputs, {"ids": values, "gaps": values}, "input")
    _compare(graph.outputs, {"scores": (FLOAT, (None, None, None))}, "output")
    _check_finite(graph)
    _check_nodes(graph, _SPLITTER_NODES)
    row = (1, _SPLITTER_TOKENS)
    _check_cost(
        cost_of(graph, {"ids": row, "gaps": row}),
        _FREE_BYTES + _ROUTER_BYTES_OVER_WEIGHTS * len(data),
        _SPLITTER_PRODUCTS,
    )


def _check_finite(graph: Graph) -> None:
    for tensor in graph.tensors.values():
        kind = _NUMPY_FLOATS.get(tensor.dtype)
        if kind is not None and not np.isfinite(np.frombuffer(tensor.raw or b"", kind)).all():
            raise ValueError(f"weight {tensor.name[:200]!r} is not finite")


def _compare(actual: dict[str, Value], expected: dict[str, tuple[int, _Shape]], what: str) -> None:
    for name in sorted(actual.keys() ^ expected.keys()):
        problem = "unexpected" if name in actual else "missing"
        raise ValueError(f"{problem} {what} {name[:200]!r}")
    for name, (dtype, shape) in expected.items():
        value = actual[name]
        fits = len(value.shape) == len(shape) and all(
            wanted is None or own is None or own == wanted
            for own, wanted in zip(value.shape, shape, strict=True)
        )
        if value.dtype != dtype or not fits:
            raise ValueError(f"{what} {name} does not match the manifest")
