"""Exports a request splitter to request_splitter.onnx."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto
from tokenizers import Tokenizer

from dlp_edge.bundle.files import SPLITTER
from dlp_edge.errors import RouterError
from dlp_edge.export.graphs.graph_builder import GraphBuilder
from dlp_edge.models.splitter.network import DILATIONS, SplitterNetwork
from dlp_edge.runtime.routing.splitter_input import splitter_input

TOLERANCE = 1e-3
PROBES = ("Write to Ann.", "Sum 1 and 2.\n\n- Then: translate it\n" * 40)


def export_splitter(network: SplitterNetwork, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the splitter's graph into `out`.

    Raises:
        RouterError: its scores differ from torch's.
    """
    model = build_graph(network).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for text in PROBES:
        tokens = splitter_input(text, tokenizer.encode(text, add_special_tokens=False))
        inputs = {"ids": tokens.ids[None], "gaps": tokens.gaps[None]}
        (actual,) = session.run(["scores"], inputs)
        with torch.no_grad():
            ids, gaps = (torch.from_numpy(value) for value in inputs.values())
            expected = network(ids, gaps, torch.ones(ids.shape)).numpy()
        difference = float(np.abs(actual - expected).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise RouterError(
                f"the request splitter's graph differs from torch by {difference:.1e}",
                "Report it, with the router folder",
            )
    (out / SPLITTER).write_bytes(model)


def build_graph(network: SplitterNetwork) -> onnx.ModelProto:
    """ids, gaps [B, L] int64 -> scores [B, L, S] float32; see `SplitterNetwork`."""
    graph = GraphBuilder("request_splitter")
    graph.constant("axis", np.array([1], np.int64))
    graph.constant("end", np.array([np.iinfo(np.int64).max], np.int64))
    graph.weight("embedding", network.embedding.weight, widen=False)
    graph.weight("gap_rows", network.gaps.weight)
    graph.add("Gather", ["embedding", "ids"], "half_tokens", axis=0)
    graph.add("Cast", ["half_tokens"], "tokens", to=TensorProto.FLOAT)
    graph.add("Gather", ["gap_rows", "gaps"], "gap_values", axis=0)
    _add_linear(graph, "entry", network.entry, "tokens", "entered")
    graph.add("Add", ["entered", "gap_values"], "value_0")
    for index, (dilation, norm, layer) in enumerate(
        zip(DILATIONS, network.norms, network.layers, strict=True)
    ):
        value, name = f"value_{index}", f"layer_{index}"
        graph.weight(f"{name}_scale", norm.weight)  # type: ignore[arg-type]
        graph.weight(f"{name}_shift", norm.bias)  # type: ignore[arg-type]
        normal = [value, f"{name}_scale", f"{name}_shift"]
        graph.add("LayerNormalization", normal, f"{name}_normal", axis=-1, epsilon=norm.eps)
        pads = np.array([0, dilation, 0, 0, dilation, 0], np.int64)
        graph.constant(f"{name}_pads", pads)
        graph.add("Pad", [f"{name}_normal", f"{name}_pads"], f"{name}_padded")
        around = []
        # The three shifts, from the padded value: [:-2d], [d:-d], [2d:].
        for at, (first, stop) in enumerate(((0, -2), (1, -1), (2, None))):
            graph.constant(f"{name}_first_{at}", np.array([first * dilation], np.int64))
            ends = "end"
            if stop is not None:
                ends = f"{name}_stop_{at}"
                graph.constant(ends, np.array([stop * dilation], np.int64))
            shifted = f"{name}_shifted_{at}"
            graph.add("Slice", [f"{name}_padded", f"{name}_first_{at}", ends, "axis"], shifted)
            around.append(shifted)
        graph.add("Concat", around, f"{name}_around", axis=2)
        _add_linear(graph, name, layer, f"{name}_around", f"{name}_out")  # type: ignore[arg-type]
        graph.add("Relu", [f"{name}_out"], f"{name}_change")
        graph.add("Add", [value, f"{name}_change"], f"value_{index + 1}")
    _add_linear(graph, "last", network.last, f"value_{len(DILATIONS)}", "scores")
    width = network.last.out_features
    return graph.model(
        {name: (TensorProto.INT64, ["B", "L"]) for name in ("ids", "gaps")},
        {"scores": (TensorProto.FLOAT, ["B", "L", width])},
    )


def _add_linear(
    graph: GraphBuilder, name: str, layer: torch.nn.Linear, value: str, output: str
) -> None:
    graph.weight(f"{name}_weight", layer.weight.T)
    graph.weight(f"{name}_bias", layer.bias)
    graph.add("MatMul", [value, f"{name}_weight"], f"{output}_product")
    graph.add("Add", [f"{output}_product", f"{name}_bias"], output)
