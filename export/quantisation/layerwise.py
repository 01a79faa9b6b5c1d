"""Runs a dense graph one decoder layer at a time, so that a pass takes the memory of one layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper

Array = npt.NDArray[Any]
Values = list[dict[str, Array]]
Edit = Callable[[onnx.GraphProto], None]

_LAYER = re.compile(r"/layers\.(\d+)/")
_HEAD = "/lm_head/MatMul"


def run_by_layer(
    path: Path,
    feeds: Sequence[Mapping[str, Array]],
    wanted: Collection[str],
    edit: Edit | None = None,
) -> Iterator[dict[str, list[Array]]]:
    """Yield the wanted values of every feed, layer by layer, as they are computed.

    Stops once all of them are.

    Args:
        path: a graph whose weights are external.
        feeds: the graph's inputs, one mapping for each pass.
        edit: changes the graph of a layer before it runs.
    """
    model = onnx.load(path, load_external_data=False)
    layers = _layers(model.graph)
    values: Values = [dict(feed) for feed in feeds]
    missing = set(wanted)
    for index, nodes in enumerate(layers):
        later = {name for rest in layers[index + 1 :] for node in rest for name in node.input}
        made = {name for node in nodes for name in node.output}
        outputs = sorted(n for n in made if n and (n in later or n in missing))
        part = _part(model, nodes, values[0], outputs)
        if edit is not None:
            edit(part.graph)
        _run(part, path.with_name("layer.onnx"), values, outputs)
        found = {name: [value[name] for value in values] for name in missing & made}
        if found:
            yield found
        missing -= made
        if not missing:
            return
        values = [{k: v for k, v in value.items() if k in later} for value in values]


def _layers(graph: onnx.GraphProto) -> list[list[onnx.NodeProto]]:
    """The nodes of each decoder layer, in order, with those before the first and after the last;
    the head, the largest matrix, is on its own."""
    place: dict[str, int] = {}
    parts: dict[int, list[onnx.NodeProto]] = {}
    for node in graph.node:
        named = _LAYER.search(node.name)
        own = 0 if named is None else 1 + int(named[1])
        at = max([own, *(place.get(name, 0) for name in node.input)])
        at = at + 1 if node.name == _HEAD else at
        place.update(dict.fromkeys(node.output, at))
        parts.setdefault(at, []).append(node)
    return [parts[at] for at in sorted(parts)]


def _part(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    values: Mapping[str, Array],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """A model of some of the nodes, whose inputs are the values."""
    needed = {name for node in nodes for name in node.input}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in values.items()
        if name in needed
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        inputs,
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _run(part: onnx.ModelProto, path: Path, values: Values, outputs: Sequence[str]) -> None:
    """Add the outputs of a part to the values of each feed."""
    if not outputs:
        return
    names = [value.name for value in part.graph.input]
    onnx.save(part, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for value in values:
        results = session.run(list(outputs), {name: value[name] for name in names})
        value.update(zip(outputs, map(np.asarray, results), strict=True))
