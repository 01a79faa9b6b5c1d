"""Exports a router folder to router.onnx, the last layer and the tokenizer.

The mini-MLP's graph is built node by node instead of by `torch.onnx.export`. That gives about sixty
nodes, fp16 weights in the file (half the size) that are cast to float32 at load time, and no mask:
the router reads one unpadded input at a time.

`torch.onnx.export` writes ALBERT's graph: optimum-onnx requires transformers below 4.58, which the
backbone's export cannot use.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto
from torch import Tensor

from dlp_edge.bundle.files import ROUTER, ROUTER_HEAD, ROUTER_TOKENIZER
from dlp_edge.bundle.manifest import RouterEntry, SelectionRule
from dlp_edge.bundle.router_head import head_to_bytes
from dlp_edge.errors import RouterError
from dlp_edge.export.graphs.graph_builder import OPSET, GraphBuilder
from dlp_edge.export.graphs.splitter import export_splitter
from dlp_edge.models.networks.network import RouterNetwork
from dlp_edge.models.networks.router_mlp import RouterMLP
from dlp_edge.models.router_folder import RouterFolder, read_card, read_router
from dlp_edge.runtime.routing.router_input import PROMPT_SEGMENTS, SEGMENTS, RouterInputEncoder

TOLERANCE = 1e-4
# Inputs to compare both engines on: a prompt, a sentence start, empty, more than fits.
PROBES = (
    ("Write an email to Ann. How much is 12 + 30?", ""),
    ("Write an email to Ann.\nHow much is 12 + 30?", "Dear Ann, see you soon.\nThe"),
    ("", ""),
    ("one two three four " * 200, "five six. " * 100 + "Seven"),
)


def router_labels(router: Path) -> tuple[str, ...]:
    """The adapter names that a router folder was trained for.

    Raises:
        RouterError: the folder is not a router that this release reads.
    """
    return read_card(router).settings.labels


def export_router(router: Path, out: Path) -> RouterEntry:
    """Write the router's graph, last layer and tokenizer into `out`; returns its manifest entry.

    Raises:
        RouterError: the folder is missing, damaged or of an unsupported version or
            architecture, or the graph's features differ from torch's.
    """
    folder = read_router(router)
    network = _load_network(folder, router)
    if isinstance(network, RouterMLP):
        model = build_graph(network).SerializeToString()
    else:
        model = trace_graph(network)
    _compare(network, model, folder)
    (out / ROUTER).write_bytes(model)
    (out / ROUTER_HEAD).write_bytes(head_to_bytes(folder.head))
    folder.tokenizer.save(str(out / ROUTER_TOKENIZER), pretty=False)
    if folder.splitter is not None:
        export_splitter(folder.splitter, folder.tokenizer, out)
    card = folder.card
    rule = SelectionRule(min_confidence=card.min_confidence)
    return RouterEntry(card.architecture, card.settings, rule, folder.splitter is not None)


def _load_network(folder: RouterFolder, source: Path) -> RouterNetwork:
    rows, width = folder.head.weight.shape
    card = folder.card
    network: RouterNetwork
    try:
        if card.architecture == "mlp":
            network = RouterMLP(card.vocab_size, rows, card.network)
        else:
            from dlp_edge.models.networks.router_albert import RouterAlbert

            network = RouterAlbert(card.vocab_size, rows, card.network)
        own = {f"head.{name}": value for name, value in network.head.state_dict().items()}
        network.load_state_dict({**folder.weights, **own})
    except (RuntimeError, TypeError, ValueError) as error:
        raise RouterError(
            f"the weights in {source} do not fit its settings ({error})",
            "Train it again with `dlp-edge train-router`",
        ) from error
    if network.width != width:
        raise RouterError(
            f"the last layer in {source} reads {width} features, its network gives {network.width}",
            "Train it again with `dlp-edge train-router`",
        )
    return network.eval()


def trace_graph(network: RouterNetwork) -> bytes:
    """input_ids [1, L] int64 -> features [1, F] float32, by torch's exporter."""
    ids = torch.zeros((1, 24), dtype=torch.int64)
    ids[:, ::2] = network.separator
    wrapped = _Unbatched(network).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / ROUTER
        torch.onnx.export(
            wrapped,
            (ids,),
            str(path),
            input_names=["input_ids"],
            output_names=["features"],
            dynamic_axes={"input_ids": {1: "L"}},
            opset_version=OPSET,
            dynamo=False,
        )
        return path.read_bytes()


class _Unbatched(torch.nn.Module):
    """A network with a single input, which needs no mask."""

    def __init__(self, network: RouterNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.network.features(input_ids, torch.ones_like(input_ids, dtype=torch.bool))


def build_graph(network: RouterMLP) -> onnx.ModelProto:
    """input_ids [B, L] int64 (unpadded inputs) -> features [B, F] float32."""
    graph = GraphBuilder("router")
    _add_members(graph, network)
    _add_means(graph, network)
    _add_maximum(graph, network)
    _add_matching(graph, network)
    graph.add("Concat", ["weighed", "maximum", "matching"], "pooled", axis=1)
    _add_layers(graph, network)
    return graph.model(
        {"input_ids": (TensorProto.INT64, ["B", "L"])},
        {"features": (TensorProto.FLOAT, ["B", network.width])},
    )


def _add_members(graph: GraphBuilder, network: RouterMLP) -> None:
    """segment [B, L], as `RouterMLP.pool` finds it, and members [B, S, L], split into those of
    the prompt's segments and those of the answer's."""
    graph.constant("separator", np.array(network.separator, np.int64))
    graph.constant("axis", np.array(1, np.int64))
    graph.constant("axis_1", np.array([1], np.int64))
    graph.constant("axis_2", np.array([2], np.int64))
    graph.constant("segments", np.arange(SEGMENTS, dtype=np.int64)[:, None])
    for name, at in (("begin", 0), ("middle", PROMPT_SEGMENTS), ("end", SEGMENTS)):
        graph.constant(name, np.array([at], np.int64))
    graph.add("Equal", ["input_ids", "separator"], "is_separator")
    graph.add("Cast", ["is_separator"], "separators", to=TensorProto.INT64)
    graph.add("CumSum", ["separators", "axis"], "segment")
    graph.add("Unsqueeze", ["segment", "axis_1"], "segment_line")
    graph.add("Equal", ["segment_line", "segments"], "is_member")
    graph.add("Cast", ["is_member"], "members", to=TensorProto.FLOAT)
    graph.add("Slice", ["members", "begin", "middle", "axis_1"], "asked")
    graph.add("Slice", ["members", "middle", "end", "axis_1"], "answered")


def _add_means(graph: GraphBuilder, network: RouterMLP) -> None:
    """tokens [B, L, 128], means [B, S, 128] and weighed [B, M x 128]."""
    graph.constant("one", np.array(1, np.float32))
    graph.weight("embedding", network.embedding.weight, widen=False)
    graph.add("Gather", ["embedding", "input_ids"], "half_tokens", axis=0)
    graph.add("Cast", ["half_tokens"], "tokens", to=TensorProto.FLOAT)
    graph.add("ReduceSum", ["members", "axis_2"], "counts", keepdims=1)
    graph.add("Max", ["counts", "one"], "divisors")
    graph.add("MatMul", ["members", "tokens"], "sums")
    graph.add("Div", ["sums", "divisors"], "means")
    graph.weight("mean_scale", network.mean_scale)
    graph.add("Unsqueeze", ["means", "axis_1"], "means_once")  # [B, 1, S, 128]
    graph.add("Mul", ["means_once", "mean_scale"], "scaled_means")  # [B, M, S, 128]
    graph.add("ReduceSum", ["scaled_means", "axis_2"], "weighed_means", keepdims=0)
    graph.add("Flatten", ["weighed_means"], "weighed", axis=1)


def _add_maximum(graph: GraphBuilder, network: RouterMLP) -> None:
    """maximum [B, 128]"""
    graph.weight("max_scale", network.max_scale)
    graph.weight("max_shift", network.max_shift)
    graph.weight("before_scale", network.before_scale)
    graph.constant("one_before", np.array([0, 1, 0, 0, -1, 0], np.int64))
    graph.add("Mul", ["tokens", "before_scale"], "scaled_tokens")
    graph.add("Pad", ["scaled_tokens", "one_before"], "before")
    graph.add("Gather", ["max_scale", "segment"], "scales", axis=0)
    graph.add("Gather", ["max_shift", "segment"], "shifts", axis=0)
    graph.add("Mul", ["tokens", "scales"], "scaled")
    graph.add("Add", ["scaled", "shifts"], "shifted")
    graph.add("Add", ["shifted", "before"], "paired")
    graph.add("ReduceMax", ["paired"], "maximum", axes=[1], keepdims=0)


def _add_matching(graph: GraphBuilder, network: RouterMLP) -> None:
    """matching [B, 128]"""
    graph.weight("rarity", network.rarity.unsqueeze(1))
    graph.weight("match_scale", network.match_scale)
    graph.weight("match_weight", network.match_weight.unsqueeze(0))
    graph.add("Unsqueeze", ["input_ids", "axis_2"], "column")
    graph.add("Unsqueeze", ["input_ids", "axis_1"], "line")
    graph.add("Equal", ["column", "line"], "is_same")
    graph.add("Cast", ["is_same"], "same", to=TensorProto.FLOAT)  # [B, L, L]
    graph.add("MatMul", ["match_weight", "answered"], "answer_weights")  # [B, 1, L]
    graph.add("MatMul", ["answer_weights", "same"], "shared_line")
    graph.add("Gather", ["rarity", "input_ids"], "rarities", axis=0)  # [B, L, 1]
    graph.add("Transpose", ["shared_line"], "shared", perm=[0, 2, 1])
    graph.add("Mul", ["shared", "rarities"], "matches")
    graph.add("MatMul", ["asked", "matches"], "found")  # [B, P, 1]
    graph.add("Softmax", ["found"], "part_weights", axis=1)
    graph.add("Slice", ["means", "begin", "middle", "axis_1"], "part_means")
    graph.add("Mul", ["part_means", "part_weights"], "weighed_parts")
    graph.add("ReduceSum", ["weighed_parts", "axis_1"], "matching_part", keepdims=0)
    graph.add("Mul", ["matching_part", "match_scale"], "matching")


def _add_layers(graph: GraphBuilder, network: RouterMLP) -> None:
    """features [B, F]"""
    value = "pooled"
    if isinstance(network.norm, torch.nn.LayerNorm):
        graph.weight("norm_scale", network.norm.weight)
        graph.weight("norm_shift", network.norm.bias)
        inputs = ["pooled", "norm_scale", "norm_shift"]
        value = "normalised"
        graph.add("LayerNormalization", inputs, value, axis=1, epsilon=network.norm.eps)
    for index, layer in enumerate(network.linear_layers):
        graph.weight(f"weight_{index}", layer.weight)
        graph.weight(f"bias_{index}", layer.bias)
        linear = f"linear_{index}"
        graph.add("Gemm", [value, f"weight_{index}", f"bias_{index}"], linear, transB=1)
        value = f"hidden_{index}"
        graph.add("Relu", [linear], value)
    parts = [value, "pooled"] if network.settings["pooled"] else [value]
    graph.add("Concat", parts, "features", axis=1)


def _compare(network: RouterNetwork, model: bytes, folder: RouterFolder) -> None:
    """Raise RouterError if onnxruntime's features differ from torch's on the probes."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    reader = RouterInputEncoder(folder.tokenizer, folder.card.settings)
    for prompt, generated in PROBES:
        ids = np.array([reader.encode(prompt, generated)], np.int64)
        (actual,) = session.run(["features"], {"input_ids": ids})
        with torch.no_grad():
            whole = torch.ones(ids.shape, dtype=torch.bool)
            expected = network.features(torch.from_numpy(ids), whole).numpy()
        difference = float(np.abs(actual - expected).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise RouterError(
                f"the router's graph differs from torch by {difference:.1e} in its features",
                "Report it, with the router folder",
            )
