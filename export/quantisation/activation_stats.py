"""Second moments X^T X of the inputs of a graph's matrices over a calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper

TEXT = Path(__file__).with_name("calibration.txt")
GROUP_BYTES = 1 << 30  # of second moments held in memory at a time

Products = npt.NDArray[np.float32]


def cut(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """Split into chunks of `size` tokens; the last may be shorter."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def input_products(
    graph: Path,
    inputs: Sequence[tuple[str, int]],
    windows: Sequence[Sequence[int]],
    head_size: int,
) -> Iterator[dict[str, Products]]:
    """Yield X^T X [K, K] of the named values X [.., K], in order, in groups that fit in memory.

    Args:
        graph: the dense graph, as `prepare_graph` leaves it.
        inputs: names and widths K of the values.
        windows: token ids, one sequence per forward pass.
        head_size: of the attention; the cache inputs of the graph do not state it.
    """
    group: list[str] = []
    size = 0
    for name, width in inputs:
        if group and size + 4 * width**2 > GROUP_BYTES:
            yield _products(graph, group, windows, head_size)
            group, size = [], 0
        group.append(name)
        size += 4 * width**2
    if group:
        yield _products(graph, group, windows, head_size)


def _products(
    path: Path,
    names: Sequence[str],
    windows: Sequence[Sequence[int]],
    head_size: int,
) -> dict[str, Products]:
    """One pass over the text; nodes after the last of the values do not run."""
    model = onnx.load(path, load_external_data=False)
    kind = model.graph.output[0].type.tensor_type.elem_type
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in names)
    probe = path.with_name("probe.onnx")
    onnx.save(model, probe)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
    sums: dict[str, Products] = {}
    for ids in windows:
        values = session.run(list(names), first_pass(model.graph, ids, head_size))
        for name, value in zip(names, values, strict=True):
            rows = value.reshape(-1, value.shape[-1]).astype(np.float32)
            sums[name] = sums.get(name, np.float32(0)) + rows.T @ rows
    return sums


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
