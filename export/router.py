"""The router's graph: a router folder becomes router.onnx and router_tokenizer.json.

The graph is written node by node rather than by `torch.onnx.export`: some forty nodes, weights that
stay fp16 in the file (half the size) and are widened to float32 when the session loads, and no
trace of padding. It reads one window at a time, so there is no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dlp_edge.bundle import ROUTER, ROUTER_TOKENIZER
from dlp_edge.errors import RouterError
from dlp_edge.manifest import RouterSettings
from dlp_edge.models.router_folder import RouterFolder, read_router, read_settings
from dlp_edge.models.router_mlp import RouterMLP
from dlp_edge.runtime.router import SEGMENTS, WindowReader

OPSET = 17
TOLERANCE = 1e-4
# What the two engines are compared on: a prompt, a sentence start, nothing, more than fits.
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
    return read_settings(router)[2].labels


def export_router(router: Path, out: Path) -> tuple[str, RouterSettings]:
    """Writes the router's graph and tokenizer into `out`; gives architecture and settings.

    Raises:
        RouterError: the folder is missing, damaged or of another version or architecture, or
            the graph does not compute what torch does.
    """
    folder = read_router(router)
    network = _load_network(folder, router)
    model = build_graph(network)
    _compare(network, model, folder)
    (out / ROUTER).write_bytes(model.SerializeToString())
    folder.tokenizer.save(str(out / ROUTER_TOKENIZER), pretty=False)
    return folder.architecture, folder.settings


def _load_network(folder: RouterFolder, source: Path) -> RouterMLP:
    network = RouterMLP(folder.vocab_size, len(folder.settings.labels))
    try:
        network.load_state_dict(folder.weights)
    except RuntimeError as error:
        raise RouterError(
            f"the weights in {source} do not fit its settings ({error})",
            "Train it again with `dlp-edge train-router`",
        ) from error
    return network.eval()


def build_graph(network: RouterMLP) -> onnx.ModelProto:
    """input_ids [B, L] int64 (each row a whole window) -> logits [B, N] float32."""
    graph = _Graph()
    graph.constant("separator", np.array(network.separator, np.int64))
    graph.constant("axis", np.array(1, np.int64))
    graph.constant("segments", np.arange(SEGMENTS, dtype=np.int64))
    graph.constant("last", np.array([-1], np.int64))
    graph.constant("positions", np.array([1], np.int64))
    graph.constant("one", np.array(1, np.float32))

    # Which segment each position belongs to, as `RouterMLP.pool` finds it.
    graph.add("Equal", ["input_ids", "separator"], "is_separator")
    graph.add("Cast", ["is_separator"], "separators", to=TensorProto.INT64)
    graph.add("CumSum", ["separators", "axis"], "segment")
    graph.add("Unsqueeze", ["segment", "last"], "segment_column")
    graph.add("Equal", ["segment_column", "segments"], "is_member")
    graph.add("Cast", ["is_member"], "members", to=TensorProto.FLOAT)  # [B, L, S]

    graph.weight("embedding", network.embedding.weight, widen=False)
    graph.add("Gather", ["embedding", "input_ids"], "half_tokens", axis=0)
    graph.add("Cast", ["half_tokens"], "tokens", to=TensorProto.FLOAT)  # [B, L, 128]

    graph.add("ReduceSum", ["members", "positions"], "counts", keepdims=1)
    graph.add("Max", ["counts", "one"], "divisors")
    graph.add("Div", ["members", "divisors"], "shares")
    graph.add("Transpose", ["shares"], "shares_by_segment", perm=[0, 2, 1])
    graph.add("MatMul", ["shares_by_segment", "tokens"], "means")  # [B, S, 128]
    graph.weight("mean_scale", network.mean_scale)
    graph.add("Mul", ["means", "mean_scale"], "scaled_means")
    graph.add("ReduceSum", ["scaled_means", "positions"], "mean", keepdims=0)

    graph.weight("max_scale", network.max_scale)
    graph.weight("max_shift", network.max_shift)
    graph.add("MatMul", ["members", "max_scale"], "scales")
    graph.add("MatMul", ["members", "max_shift"], "shifts")
    graph.add("Mul", ["tokens", "scales"], "scaled")
    graph.add("Add", ["scaled", "shifts"], "shifted")
    graph.add("ReduceMax", ["shifted"], "maximum", axes=[1], keepdims=0)
    graph.add("Concat", ["mean", "maximum"], "pooled", axis=1)  # [B, 256]

    layers = [layer for layer in network.layers if isinstance(layer, torch.nn.Linear)]
    value = "pooled"
    for index, layer in enumerate(layers):
        final = layer is layers[-1]
        graph.weight(f"weight_{index}", layer.weight)
        graph.weight(f"bias_{index}", layer.bias)
        name = "logits" if final else f"linear_{index}"
        graph.add("Gemm", [value, f"weight_{index}", f"bias_{index}"], name, transB=1)
        if not final:
            graph.add("Relu", [name], f"hidden_{index}")
            value = f"hidden_{index}"
    return graph.model(layers[-1].out_features)


class _Graph:
    """Collects the nodes and weights of one ONNX graph."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> None:
        self._initializers.append(numpy_helper.from_array(value, name))

    def weight(self, name: str, value: Tensor, widen: bool = True) -> None:
        """A trained weight, fp16 in the file; `widen` gives float32 under its name."""
        stored = f"{name}_half" if widen else name
        self.constant(stored, value.detach().to(torch.float16).numpy())
        if widen:
            self.add("Cast", [stored], name, to=TensorProto.FLOAT)

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: object) -> None:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))

    def model(self, num_labels: int) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes,
            "router",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "L"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", num_labels])],
            self._initializers,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model


def _compare(network: RouterMLP, model: onnx.ModelProto, folder: RouterFolder) -> None:
    """Raises RouterError unless onnxruntime gives torch's logits on the probes."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    reader = WindowReader(folder.tokenizer, folder.settings)
    for prompt, generated in PROBES:
        ids = np.array([reader.window(prompt, generated)], np.int64)
        (found,) = session.run(["logits"], {"input_ids": ids})
        with torch.no_grad():
            expected = network(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.bool))
        difference = float(np.abs(found - expected.numpy()).max())
        if not difference <= TOLERANCE:
            raise RouterError(
                f"the router's graph differs from torch by {difference:.1e} in its logits",
                "Report it, with the router folder",
            )
