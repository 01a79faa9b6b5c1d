"""Chooses which matrices of a backbone become int4, and quantises them.

Matrices whose weights already lie on a 4-bit grid keep their levels. GPTQ quantises the others, and
the cost of int4 is measured for each kind of matrix in each third of the layers: the
Kullback-Leibler divergence from the dense model on held-out calibration text, an estimate of the
loss in log perplexity. The cheapest per weight become int4, up to BUDGET in total; the rest, int8.

A large head is split: int8 for the first rows, GPTQ int4 for the rest. Tokenizers order merges by
frequency, so errors on late rows affect rare tokens only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from tokenizers import Tokenizer

from dlp_edge.bundle.manifest import BackboneEntry
from dlp_edge.export.quantisation.activation_stats import TEXT, cut, first_pass, input_products
from dlp_edge.export.quantisation.gptq import round_gptq
from dlp_edge.export.quantisation.grid_detection import find_grid
from dlp_edge.export.quantisation.layerwise import run_by_layer
from dlp_edge.export.quantisation.matrix_files import MatrixFiles
from dlp_edge.export.quantisation.quantise import (
    HEAD,
    Quantised,
    Quantiser,
    SplitRows,
    WithBlockMeans,
    matrices,
)
from dlp_edge.export.quantisation.quantized_matrix import round_int8
from dlp_edge.export.weights import WeightFile

Array = npt.NDArray[np.floating]
Unit = tuple[str, int]

BUDGET = 0.015  # of log perplexity; with the loss by int8, a perplexity ratio of about 1.02
WINDOW = 256  # tokens of calibration text in one forward pass
HELD_OUT = 2 * WINDOW  # tokens at the end of the text, held out to measure the costs
LARGE_HEAD = 8192  # rows; a smaller head is int8 throughout, since it costs little time
COMMON = 1 / 6  # share of a large head's rows that become int8
TRIED = 8  # give up after this many matrices off the grid: two layers
_LAYER = re.compile(r"layers\.(\d+)/")


class Int4:
    """Chooses the format of every matrix of a graph.

    Attributes:
        costs: the divergence that int4 causes in each unit (kind of matrix, third of the layers)
            of matrices off any grid.
        kept: names of the MatMul nodes that become int4.
    """

    def __init__(
        self,
        quantiser: Quantiser,
        dense: Path,
        entry: BackboneEntry,
        tokenizer: Tokenizer,
        on_grid: Collection[str],
        calibration: str | None = None,
    ) -> None:
        """
        Args:
            quantiser: of the graph that is about to be rewritten.
            dense: the file of the same graph.
            entry: the backbone's manifest entry.
            on_grid: names of the MatMul nodes whose weights lie on a 4-bit grid already.
            calibration: text instead of the package's own.
        """
        self.costs: dict[Unit, float] = {}
        self.kept: set[str] = set()
        self._gptq = MatrixFiles(dense.parent / "gptq")
        self._quantiser = quantiser
        self._dense = dense
        self._head_size = entry.head_size
        self._on_grid = on_grid
        text = TEXT.read_text(encoding="utf-8") if calibration is None else calibration
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        self._calibration = cut(ids[:-HELD_OUT], min(WINDOW, entry.context_length))
        self._held_out = cut(ids[-HELD_OUT:], min(HELD_OUT, entry.context_length))

    def run(self, on_progress: Callable[[float], None]) -> None:
        """Quantise what lies on no grid with GPTQ, and measure how much of it can afford int4.

        Args:
            on_progress: called with the fraction done.
        """
        self.kept = set(self._on_grid)
        graph = self._quantiser.graph
        body = [node for node in _body(graph) if node.name not in self.kept]
        head = _large_head(graph, self._quantiser.weights)
        self._round([*body, *head], lambda done: on_progress(done * 0.6))
        self._measure(body, lambda done: on_progress(0.6 + done * 0.4))

    def choose(self, node: onnx.NodeProto, matrix: Array) -> Quantised:
        """The quantised form of a matrix [N, K]."""
        dtype = self._quantiser.dtype
        if node.name == HEAD and node.name in self._gptq:
            rest = self._gptq[node.name]
            common = len(matrix) - len(rest.levels)
            return SplitRows(round_int8(matrix[:common], dtype), rest)
        if node.name not in self.kept:
            return round_int8(matrix, dtype)
        if node.name in self._gptq:
            return self._gptq[node.name]
        grid = find_grid(matrix, dtype)
        if grid is None:
            return round_int8(matrix, dtype)
        return grid.matrix if grid.is_whole else WithBlockMeans(grid.with_block_means(dtype))

    def _round(self, nodes: Sequence[onnx.NodeProto], on_progress: Callable[[float], None]) -> None:
        """Quantise the matrices with GPTQ; of the head, only the rows after the common ones."""
        waiting = [node for node in nodes if node.name not in self._gptq]
        inputs = list(dict.fromkeys(node.input[0] for node in waiting))
        done = len(nodes) - len(waiting)
        for products in input_products(self._dense, inputs, self._calibration, self._head_size):
            for node in waiting:
                if node.input[0] in products:
                    matrix = _matrix(node, self._quantiser.weights)
                    rest = matrix[int(COMMON * len(matrix)) :] if node.name == HEAD else matrix
                    self._gptq[node.name] = round_gptq(
                        rest, products[node.input[0]], self._quantiser.dtype
                    )
                    done += 1
                    on_progress(done / len(nodes))

    def _measure(
        self, body: Sequence[onnx.NodeProto], on_progress: Callable[[float], None]
    ) -> None:
        if not body:
            return
        units: dict[Unit, list[onnx.NodeProto]] = {}
        last = max(_layer(node.name) for node in body)
        for node in body:
            units.setdefault((_kind(node.name), 3 * _layer(node.name) // (last + 1)), []).append(
                node
            )
        expected = self._predictions([])
        for index, (unit, nodes) in enumerate(units.items()):
            self.costs[unit] = divergence(expected, self._predictions(nodes))
            on_progress((index + 1) / len(units))
        weights = self._quantiser.weights
        sizes = {
            unit: sum(math.prod(weights.shape(node.input[1])) for node in nodes)
            for unit, nodes in units.items()
        }
        total = 0.0
        for unit in sorted(units, key=lambda unit: self.costs[unit] / sizes[unit]):
            total += self.costs[unit]
            if total > BUDGET:
                break
            self.kept.update(node.name for node in units[unit])

    def _predictions(self, int4: Sequence[onnx.NodeProto]) -> Array:
        """Logits [HELD_OUT, V] of the dense graph with some of its matrices in int4."""
        names = {node.name for node in int4}

        def edit(graph: onnx.GraphProto) -> None:
            for node in [node for node in graph.node if node.name in names]:
                self._quantiser.put(graph, node, self._gptq[node.name])

        dense = onnx.load(self._dense, load_external_data=False).graph
        feeds = [first_pass(dense, ids, self._head_size) for ids in self._held_out]
        (found,) = run_by_layer(self._dense, feeds, ["logits"], edit)
        logits: Array = np.concatenate([values[0] for values in found["logits"]])
        return logits.astype(np.float32)


def find_on_grid(graph: onnx.GraphProto, weights: WeightFile, dtype: npt.DTypeLike) -> set[str]:
    """Names of the body's MatMul nodes whose weights lie on a 4-bit grid.

    Empty if fewer than half do: then the match is accidental.
    """
    found: set[str] = set()
    body = _body(graph)
    for index, node in enumerate(body):
        if find_grid(_matrix(node, weights), dtype) is not None:
            found.add(node.name)
        elif not found and index >= TRIED:
            break
    return found if 2 * len(found) >= len(body) else set()


def divergence(expected: Array, found: Array) -> float:
    """The mean Kullback-Leibler divergence of softmax(found) from softmax(expected), [S, V]."""
    total = 0.0
    for one, other in zip(expected, found, strict=True):
        log_p, log_q = _log_softmax(one), _log_softmax(other)
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
    return total / len(expected)


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max()
    found: Array = shifted - np.log(np.exp(shifted).sum())
    return found


def _body(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in matrices(graph) if node.name != HEAD]


def _large_head(graph: onnx.GraphProto, weights: WeightFile) -> list[onnx.NodeProto]:
    """The head, if it has at least LARGE_HEAD rows."""
    return [
        node
        for node in matrices(graph)
        if node.name == HEAD and weights.shape(node.input[1])[1] >= LARGE_HEAD
    ]


def _matrix(node: onnx.NodeProto, weights: WeightFile) -> Array:
    return np.ascontiguousarray(weights.read(node.input[1]).T)


def _kind(name: str) -> str:
    return _LAYER.sub("", name)


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else 0
