"""Replaces the weight matrices of a dense graph by quantised operators of onnxruntime.

A weight matrix is a MatMul with a constant, so one path serves all backbones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from dlp_edge.export.quantisation.nf4 import BLOCK as NF4_BLOCK
from dlp_edge.export.quantisation.nf4 import NF4, Nf4
from dlp_edge.export.quantisation.quantized_matrix import BLOCK, QuantizedMatrix, round_int8
from dlp_edge.export.weights import WeightFile

HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/Gather"
MICROSOFT = "com.microsoft"  # onnxruntime's operators
# accuracy_level of MatMulNBits. 4 quantises the input to int8 as well, which makes it fast on a
# CPU; CUDA ignores it and computes in fp16.
ACCURACY = {"cpu": 4, "cuda": 0}

Array = npt.NDArray[np.floating]


@dataclass(frozen=True)
class WithBlockMeans:
    """A matrix [N, K] followed by columns that multiply the block means of the input."""

    matrix: QuantizedMatrix


@dataclass(frozen=True)
class SplitRows:
    """A matrix in two parts: its first rows and the rest, each in its own format."""

    first: QuantizedMatrix
    rest: QuantizedMatrix


Quantised = QuantizedMatrix | WithBlockMeans | SplitRows | Nf4
Chooser = Callable[[onnx.NodeProto, Array], Quantised]


def matrices(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The MatMuls whose second input is a weight matrix [K, N]; the head is one of them."""
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]


@dataclass
class Quantiser:
    """Rewrites a graph in place.

    Attributes:
        weights: where the graph's weights are read from and written to.
        target: "cpu" or "cuda".
    """

    graph: onnx.GraphProto
    weights: WeightFile
    target: str
    _with_means: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> npt.DTypeLike:
        """The compute type of the graph."""
        return np.float32 if self.target == "cpu" else np.float16

    def run(self, choose: Chooser, on_progress: Callable[[float], None]) -> None:
        """Replaces all matrices, and the embedding where its width is a multiple of BLOCK.

        A tied embedding reads the head's bytes; others are int8.

        Args:
            choose: returns the quantised form of a matrix [N, K].
            on_progress: called with the fraction done.
        """
        nodes = matrices(self.graph)
        for index, node in enumerate(nodes):
            weight = np.ascontiguousarray(self.weights.read(node.input[1]).T)
            quantised = choose(node, weight)
            self._replace(node, self._nodes(node, weight.shape[1], quantised))
            if node.name == HEAD:
                self._embed(node.input[1], weight, quantised)
            on_progress((index + 1) / len(nodes))

    def put(self, graph: onnx.GraphProto, node: onnx.NodeProto, levels: QuantizedMatrix) -> None:
        """Replace a node of another graph, with the weights stored inline. For trial graphs."""
        inputs = [node.input[0]]
        for kind, tensor in levels.tensors().items():
            inputs.append(f"{node.input[1]}_{kind}")
            graph.initializer.append(onnx.numpy_helper.from_array(tensor, inputs[-1]))
        width = self.weights.shape(node.input[1])[0]
        node.CopyFrom(self._int_node(node, inputs, levels, width))

    def _nodes(
        self, node: onnx.NodeProto, width: int, quantised: Quantised
    ) -> list[onnx.NodeProto]:
        if isinstance(quantised, Nf4):
            return [self._nf4_node(node, width, quantised)]
        if isinstance(quantised, QuantizedMatrix):
            return self._int_nodes(node, quantised, width)
        if isinstance(quantised, SplitRows):
            return self._split_nodes(node, quantised, width)
        before = self._extend(node.input[0], width)
        node.input[0] = self._with_means[node.input[0]]
        return [
            *before,
            *self._int_nodes(node, quantised.matrix, quantised.matrix.levels.shape[1] * BLOCK),
        ]

    def _int_nodes(
        self, node: onnx.NodeProto, levels: QuantizedMatrix, width: int, name: str | None = None
    ) -> list[onnx.NodeProto]:
        """
        Args:
            name: prefix of the initializers; the name of the matrix by default.
        """
        stored, casts = self._store(name or node.input[1], levels)
        return [*casts, self._int_node(node, [node.input[0], *stored], levels, width)]

    def _store(self, name: str, levels: QuantizedMatrix) -> tuple[list[str], list[onnx.NodeProto]]:
        """Write a matrix; returns the inputs that MatMulNBits reads it by, and the nodes that make
        them.

        MatMulNBits wants scales of the type of its input, so a Cast widens those in half precision
        when the bundle is loaded.
        """
        inputs, casts = list[str](), list[onnx.NodeProto]()
        for kind, tensor in levels.stored().items():
            inputs.append(self.weights.add(f"{name}_{kind}", tensor))
            if kind == "scales" and tensor.dtype != self.dtype:
                half, inputs[-1] = inputs[-1], f"{inputs[-1]}_wide"
                casts.append(self._widen(half, inputs[-1]))
        return inputs, casts

    def _widen(self, half: str, wide: str) -> onnx.NodeProto:
        return helper.make_node("Cast", [half], [wide], name=wide, to=TensorProto.FLOAT)

    def _split_nodes(
        self, node: onnx.NodeProto, split: SplitRows, width: int
    ) -> list[onnx.NodeProto]:
        """One product for each part, and a Concat of their outputs."""
        products, outputs = list[onnx.NodeProto](), list[str]()
        for part, levels in (("first", split.first), ("rest", split.rest)):
            own = onnx.NodeProto()
            own.CopyFrom(node)
            own.name, own.output[0] = f"{node.name}/{part}", f"{node.output[0]}/{part}"
            products += self._int_nodes(own, levels, width, f"{node.input[1]}_{part}")
            outputs.append(own.output[0])
        return [
            *products,
            helper.make_node("Concat", outputs, list(node.output), name=node.name, axis=-1),
        ]

    def _int_node(
        self, node: onnx.NodeProto, inputs: list[str], levels: QuantizedMatrix, width: int
    ) -> onnx.NodeProto:
        return helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            name=node.name,
            domain=MICROSOFT,
            K=width,
            N=len(levels.levels),
            bits=levels.bits,
            block_size=BLOCK,
            accuracy_level=ACCURACY[self.target],
        )

    def _nf4_node(self, node: onnx.NodeProto, width: int, matrix: Nf4) -> onnx.NodeProto:
        name = node.input[1]
        absmax = matrix.absmax.astype(self.dtype)
        return helper.make_node(
            "MatMulBnb4",
            [
                node.input[0],
                self.weights.add(f"{name}_levels", matrix.levels),
                self.weights.add(f"{name}_absmax", absmax),
            ],
            list(node.output),
            name=node.name,
            domain=MICROSOFT,
            K=width,
            N=2 * len(matrix.levels) // width,
            block_size=NF4_BLOCK,
            quant_type=NF4,
        )

    def _extend(self, x: str, width: int) -> list[onnx.NodeProto]:
        """Nodes that append the block means of x [.., width], zero-padded to whole blocks.

        Empty if another matrix with the same input added them. The means are a product with a
        constant: as fast as pooling on a CPU, and pooling on CUDA would need cuDNN.
        """
        if x in self._with_means:
            return []
        blocks = width // BLOCK
        means = f"block_means_{width}"
        if means not in self.weights:
            matrix = np.zeros((width, -(-blocks // BLOCK) * BLOCK), self.dtype)
            matrix[np.arange(width), np.arange(width) // BLOCK] = 1 / BLOCK
            self.weights.add(means, matrix)
        self._with_means[x] = f"{x}/extended"
        return [
            helper.make_node("MatMul", [x, means], [f"{x}/means"], name=f"{x}/means"),
            helper.make_node(
                "Concat", [x, f"{x}/means"], [f"{x}/extended"], name=f"{x}/extended", axis=-1
            ),
        ]

    def _embed(self, head: str, weight: Array, quantised: Quantised) -> None:
        """Make the embedding look up quantised rows: the head's if it is tied, else its own.

        Args:
            head: the name of the head's matrix.
            weight: that matrix [V, K].
            quantised: what became of it.
        """
        width = weight.shape[1]
        gather = next((node for node in self.graph.node if node.name == EMBEDDING), None)
        if gather is None or width % BLOCK:
            return
        name = gather.input[0]
        tie = next((n for n in self.graph.node if name in n.output and n.input[0] == head), None)
        if tie is not None:
            self.graph.node.remove(tie)
        elif name in self.weights:
            weight = self.weights.read(name)
        else:
            return
        if tie is not None and isinstance(quantised, QuantizedMatrix):
            nodes = self._lookup(gather, gather.input[1], gather.output[0], head, quantised)
        elif tie is not None and isinstance(quantised, SplitRows):
            nodes = self._split_lookup(gather, head, quantised)
        else:
            levels = round_int8(weight, self.dtype)
            name = f"{head}_embedding" if tie is not None else name
            stored = levels.stored()
            self.weights.add(f"{name}_bytes", stored["levels"].reshape(-1, width))
            self.weights.add(f"{name}_scales", stored["scales"])
            nodes = self._lookup(gather, gather.input[1], gather.output[0], name, levels)
        self._replace(gather, nodes)

    def _lookup(
        self, gather: onnx.NodeProto, ids: str, rows: str, matrix: str, levels: QuantizedMatrix
    ) -> list[onnx.NodeProto]:
        """Nodes that look up rows [.., K] of a stored matrix.

        Args:
            ids, rows: the names of their input and of their output.
            matrix: the name that the matrix was stored under.
        """
        nodes = []
        if f"{matrix}_bytes" not in self.weights:
            shape = self.weights.add(f"{matrix}_row", np.asarray([-1, levels.row_bytes], np.int64))
            inputs, outputs = [f"{matrix}_levels", shape], [f"{matrix}_bytes"]
            nodes.append(helper.make_node("Reshape", inputs, outputs, name=outputs[0]))
        scales = f"{matrix}_scales"
        half = self.weights.dtype(scales) != self.dtype
        found = f"{rows}_half" if half else rows
        zeros = [f"{matrix}_zeros"] if levels.zeros is not None else []
        lookup = helper.make_node(
            "GatherBlockQuantized",
            [f"{matrix}_bytes", ids, scales, *zeros],
            [found],
            name=f"{gather.name}/{matrix}",
            domain=MICROSOFT,
            bits=levels.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
        nodes.append(lookup)
        return [*nodes, self._widen(found, rows)] if half else nodes

    def _split_lookup(
        self, gather: onnx.NodeProto, head: str, split: SplitRows
    ) -> list[onnx.NodeProto]:
        """Nodes that look up rows of a matrix in two parts: a row of each, of which one is used."""
        (ids,), (out,) = gather.input[1:], gather.output
        common = len(split.first.levels)
        for name, number in (("last", common - 1), ("common", common), ("none", 0)):
            self.weights.add(f"{out}/{name}", np.asarray(number, np.int64))
        self.weights.add(f"{out}/axis", np.asarray([-1], np.int64))

        def node(kind: str, inputs: list[str], output: str) -> onnx.NodeProto:
            return helper.make_node(kind, inputs, [output], name=output)

        return [
            node("Min", [ids, f"{out}/last"], f"{out}/first_ids"),
            node("Sub", [ids, f"{out}/common"], f"{out}/shifted"),
            node("Max", [f"{out}/shifted", f"{out}/none"], f"{out}/rest_ids"),
            *self._lookup(gather, f"{out}/first_ids", f"{out}/first", f"{head}_first", split.first),
            *self._lookup(gather, f"{out}/rest_ids", f"{out}/rest", f"{head}_rest", split.rest),
            node("GreaterOrEqual", [ids, f"{out}/common"], f"{out}/is_late"),
            node("Unsqueeze", [f"{out}/is_late", f"{out}/axis"], f"{out}/is_rest"),
            node("Where", [f"{out}/is_rest", f"{out}/rest", f"{out}/first"], out),
        ]

    def _replace(self, node: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
        position = list(self.graph.node).index(node)
        del self.graph.node[position]
        for offset, new in enumerate(nodes):
            self.graph.node.insert(position + offset, new)


def store_half(graph: onnx.GraphProto, weights: WeightFile) -> None:
    """Store the matrices of an fp32 graph as fp16; onnxruntime casts them to fp32 at load time."""
    names = [node.input[1] for node in matrices(graph)]
    gather = next((node for node in graph.node if node.name == EMBEDDING), None)
    if gather is not None and gather.input[0] in weights:
        names.append(gather.input[0])
    casts = []
    for name in dict.fromkeys(names):
        half = weights.add(f"{name}_half", weights.read(name).astype(np.float16))
        weights.drop(name)
        casts.append(
            helper.make_node("Cast", [half], [name], name=f"{name}_cast", to=TensorProto.FLOAT)
        )
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *rest])
