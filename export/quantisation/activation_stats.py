"""Second moments X^T X of the inputs of a graph's matrices over a calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from dlp_edge.export.quantisation.layerwise import run_by_layer

TEXT = Path(__file__).with_name("calibration.txt")

Products = npt.NDArray[np.float32]


def cut(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """Split into chunks of `size` tokens; the last may be shorter."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def input_products(
    graph: Path,
    inputs: Sequence[str],
    windows: Sequence[Sequence[int]],
    head_size: int,
) -> Iterator[dict[str, Products]]:
    """Yield X^T X [K, K] of the named values X [.., K], layer by layer.

    Args:
        graph: the dense graph, as `prepare_graph` leaves it.
        inputs: names of the values.
        windows: token ids, one sequence per forward pass.
        head_size: of the attention; the cache inputs of the graph do not state it.
    """
    dense = onnx.load(graph, load_external_data=False).graph
    feeds = [first_pass(dense, ids, head_size) for ids in windows]
    for found in run_by_layer(graph, feeds, inputs):
        yield {name: _moments(values) for name, values in found.items()}


def _moments(values: Sequence[npt.NDArray[Any]]) -> Products:
    total: Any = np.float32(0)
    for value in values:
        rows = value.reshape(-1, value.shape[-1]).astype(np.float32)
        total = total + rows.T @ rows
    return np.asarray(total, np.float32)


def first_pass(graph: onnx.GraphProto, ids: Sequence[int], head_size: int) -> dict[str, Any]:
    """Inputs for a prefill of ids [S] with logits at every position, an empty cache and no
    adapter."""
    lengths = {
        "input_ids": np.asarray(ids, np.int64)[None],
        "seqlens_k": np.asarray([len(ids) - 1], np.int32),
        "total_sequence_length": np.asarray(len(ids), np.int32),
        "logit_positions": np.arange(len(ids), dtype=np.int64),
    }
    feed: dict[str, Any] = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if value.name in lengths:
            feed[value.name] = lengths[value.name]
        elif len(dims) == 4:  # cache [1, kv heads, 0, head size]
            feed[value.name] = np.zeros((1, dims[1].dim_value, 0, head_size), dtype)
        else:  # slots [1, 0, h] and [1, 0, d]
            feed[value.name] = np.zeros((1, 0, dims[2].dim_value), dtype)
    return feed
