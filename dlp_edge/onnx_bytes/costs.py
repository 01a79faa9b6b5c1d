"""Bounds the memory and the multiplications of a pass, from the shapes of a graph's values.

A graph whose shapes cannot be followed (`shape_rules`) is refused: no export writes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dlp_edge.onnx_bytes.reader import Graph
from dlp_edge.onnx_bytes.shape_rules import Array, Shape, constant_of, outputs_of

ITEM_BYTES = 8  # of any element, the largest of the types
MAX_ELEMENTS = 1 << 40
MAX_RANK = 8
# What an element takes in any operator, and in those that differ, in multiplications of a matrix.
_ELEMENT_COST = 32
_ELEMENT_COSTS = {
    **dict.fromkeys("Constant Identity Shape".split(), 0),
    **dict.fromkeys("Flatten Reshape Squeeze Unsqueeze".split(), 4),
    **dict.fromkeys("FusedMatMul Gemm MatMul MatMulBnb4 MatMulNBits".split(), 8),
    **dict.fromkeys(
        "CumSum Div Erf Gelu LayerNormalization Pow Sigmoid SimplifiedLayerNormalization"
        " SkipSimplifiedLayerNormalization Softmax Tanh Transpose".split(),
        128,
    ),
}


@dataclass(frozen=True)
class Cost:
    """What a pass takes.

    Attributes:
        bytes: of all values alive at once, and of all that depend on constants alone: onnxruntime
            computes and keeps those.
        products: multiplications of matrices, and what other work takes in these.
    """

    bytes: int
    products: int


def cost_of(graph: Graph, inputs: Mapping[str, Shape]) -> Cost:
    """The cost of a pass with inputs of these shapes.

    Raises:
        ValueError: the shapes cannot be followed.
    """
    arrays = {name: constant_of(tensor) for name, tensor in graph.tensors.items()}
    arrays |= {name: Array(shape) for name, shape in inputs.items()}
    last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    constant, alive = {"", *graph.tensors}, dict[str, int]()
    now = most = products = 0
    for index, node in enumerate(graph.nodes):
        missing = [name for name in node.inputs if name and name not in arrays]
        if missing:
            raise ValueError(f"{missing[0][:100]!r} is used before it is computed")
        if node.kind == "Identity" and constant.issuperset(node.inputs):
            constant.update(node.outputs)
        inputs_of = [arrays[n] if n else None for n in node.inputs]
        outputs, count = outputs_of(node, inputs_of)
        elements = max(array.size for array in (*outputs, *inputs_of) if array is not None)
        products += count + elements * _ELEMENT_COSTS.get(node.kind, _ELEMENT_COST)
        for name, array in zip(node.outputs, outputs, strict=False):
            if not name:  # an optional output that is not wanted
                continue
            if array.size > MAX_ELEMENTS or len(array.shape) > MAX_RANK:
                raise ValueError(f"{node.kind} makes a tensor of the shape {array.shape}")
            if name in arrays:
                raise ValueError(f"{name[:100]!r} is computed twice")
            arrays[name] = array
            size = array.size * ITEM_BYTES
            if node.kind == "Identity" and name in constant:
                continue
            now += size
            if constant.issuperset(node.inputs):
                constant.add(name)
            else:
                alive[name] = size
        most = max(most, now)
        for name in (*node.inputs, *node.outputs):
            if last.get(name, -1) <= index:
                now -= alive.pop(name, 0)
    return Cost(most, products)
