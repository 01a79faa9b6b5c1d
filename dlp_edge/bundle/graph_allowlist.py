"""Validates a bundle's two graphs: allowed operators, and the inputs and outputs expected."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlp_edge.bundle.manifest import BackboneEntry, RouterEntry
from dlp_edge.onnx_bytes.reader import FLOAT, FLOAT16, INT32, INT64, Graph, Value, read_graph

# Every operator that exports use, over all model families, formats and targets.
BACKBONE_OPERATORS = frozenset(
    "Add Cast Concat Constant Div Gather Gelu MatMul Mul Reshape Sigmoid"
    " SimplifiedLayerNormalization Split Tanh Transpose".split()
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
_FLOATS = {"float32": FLOAT, "float16": FLOAT16}
_NUMPY_FLOATS: dict[int, np.dtype[Any]] = {FLOAT: np.dtype("<f4"), FLOAT16: np.dtype("<f2")}

# None matches any dimension.
_Shape = tuple[int | None, ...]


def check_backbone(data: bytes, entry: BackboneEntry, external: str, external_size: int) -> Graph:
    """Reads and checks the backbone's graph.

    Args:
        external: the name of its weight file.
        external_size: size of that file in bytes.

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
    return graph


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


def check_router(data: bytes, entry: RouterEntry) -> tuple[Graph, int]:
    """Reads and checks the router's graph; returns it and its number of features.

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
    return graph, width


def check_splitter(data: bytes) -> None:
    """Reads and checks the request splitter's graph.

    Raises:
        ValueError: as for `check_router`.
    """
    graph = read_graph(data, SPLITTER_OPERATORS, None)
    row: _Shape = (None, None)
    _compare(graph.inputs, {"ids": (INT64, row), "gaps": (INT64, row)}, "input")
    _compare(graph.outputs, {"scores": (FLOAT, (None, None, None))}, "output")
    _check_finite(graph)


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
