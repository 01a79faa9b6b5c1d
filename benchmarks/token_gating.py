"""The price of gating every token (MeteoRA, MoLE and their kin) beside one fusion a sentence.

    python benchmarks/token_gating.py BUNDLE [--adapters 8 32]

Builds the bundle's graph once more with a gate in every slot: for each token `softmax(top-2(x W))`
chooses and weighs two adapters, either by gathering their matrices (`gather`) or by running all
adapters side by side and silencing the others (`dense`). Same weights, loop and machine; the
gates are untrained, which changes no time. With gates of zero the first two adapters get one half
each, and the logits must be those of our own fusion of the two: that is checked first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from dlp_edge.bundle.adapter_stack import AdapterStack
from dlp_edge.bundle.bundle import Bundle, open_bundle
from dlp_edge.bundle.files import BACKBONE
from dlp_edge.bundle.manifest import Slot
from dlp_edge.export.report import HELDOUT
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.device import choose_device
from dlp_edge.runtime.fusion.copying import CopyingFuser

Array = npt.NDArray[np.float32]
TOP = 2
CONTEXT = 1024


def gated_engine(
    bundle: Bundle, adapters: int, way: str, gates: np.random.Generator | None
) -> Engine:
    """An engine whose graph gates every token between this many adapters.

    Args:
        adapters: more than the bundle has are made by repeating its own.
        way: "gather" or "dense".
        gates: makes the gates' weights; None makes them zero.
    """
    entry = bundle.manifest.backbone
    model = onnx.load(bundle.path(BACKBONE), load_external_data=False)
    names = list(bundle.adapters().rows)
    chosen = [names[i % len(names)] for i in range(adapters)]
    for slot in entry.slots:
        a, b = stacked(bundle.adapters(), slot, chosen)
        shape = (slot.input_size, adapters)
        gate = np.zeros(shape) if gates is None else gates.normal(size=shape)
        _gate_slot(model.graph, slot, a, b, gate.astype(np.float32), way)
    # Both ways on onnxruntime's operators: the gated slots are made of them.
    device = replace(choose_device("cpu", "cpu", None), operators=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / BACKBONE
        onnx.save(model, path)
        data = bundle.path(f"{BACKBONE}.data")
        (path.parent / data.name).write_bytes(data.read_bytes())
        backbone = open_backbone(path, replace(entry, slots=()), device)
    return make_engine(backbone, AdapterStack(), CONTEXT)


def stacked(stack: AdapterStack, slot: Slot, chosen: list[str]) -> tuple[Array, Array]:
    """A [N, rho, h] and B [N, rho, d] of a slot, scaled; smaller ranks are padded with zeros."""
    pairs = []
    for name in chosen:
        fused = CopyingFuser(stack, [slot], "float32").fuse({name: 1.0})
        pairs.append((fused[f"{slot.name}.A"][0], fused[f"{slot.name}.B"][0]))
    rho = max(a.shape[0] for a, _ in pairs)
    a, b = (
        np.stack([np.pad(matrix, ((0, rho - matrix.shape[0]), (0, 0))) for matrix in matrices])
        for matrices in zip(*pairs, strict=True)
    )
    return a, b


def _gate_slot(
    graph: onnx.GraphProto, slot: Slot, a: Array, b: Array, gate: Array, way: str
) -> None:
    """Puts gate and adapters where the slot's two products were."""
    down = next(node for node in graph.node if f"{slot.name}.A" in node.input)
    up = next(node for node in graph.node if f"{slot.name}.B" in node.input)
    builder = _Builder(graph, slot.name, list(graph.node).index(down))
    x, y = down.input[0], up.output[0]
    graph.node.remove(down)
    graph.node.remove(up)
    for value in [v for v in graph.input if v.name in (f"{slot.name}.A", f"{slot.name}.B")]:
        graph.input.remove(value)
    scores = builder.add("MatMul", x, builder.constant(gate))  # [1, S, N]
    best, which = builder.add_two("TopK", scores, builder.constant(np.array([TOP])))
    weights = builder.add("Softmax", best)  # [1, S, k]
    (_gather if way == "gather" else _dense)(builder, x, y, a, b, weights, which)


def _gather(
    builder: _Builder, x: str, y: str, a: Array, b: Array, weights: str, which: str
) -> None:
    rho, size = a.shape[1], b.shape[2]
    own_a = builder.add("Gather", builder.constant(a), which)  # [1, S, k, rho, h]
    own_b = builder.add("Gather", builder.constant(b), which)  # [1, S, k, rho, d]
    column = builder.add("Unsqueeze", x, builder.constant(np.array([2, 4])))
    down = builder.add("MatMul", own_a, column)  # [1, S, k, rho, 1]
    share = builder.add("Unsqueeze", weights, builder.constant(np.array([3, 4])))
    weighed = builder.add("Mul", down, share)
    row = builder.add("Reshape", weighed, builder.constant(np.array([0, 0, 1, TOP * rho])))
    table = builder.add("Reshape", own_b, builder.constant(np.array([0, 0, TOP * rho, size])))
    product = builder.add("MatMul", row, table)  # [1, S, 1, d]
    builder.add("Squeeze", product, builder.constant(np.array([2])), output=y)


def _dense(builder: _Builder, x: str, y: str, a: Array, b: Array, weights: str, which: str) -> None:
    count, rho, width = a.shape
    all_a = builder.constant(np.ascontiguousarray(a.reshape(count * rho, width).T))
    all_b = builder.constant(b.reshape(count * rho, -1))
    down = builder.add("MatMul", x, all_a)  # [1, S, N rho]
    apart = builder.add("Reshape", down, builder.constant(np.array([0, 0, count, rho])))
    one_hot = builder.add(
        "OneHot", which, builder.constant(np.array(count)), builder.constant(np.float32([0, 1]))
    )  # [1, S, k, N]
    lying = builder.add("Unsqueeze", weights, builder.constant(np.array([2])))
    mask = builder.add("MatMul", lying, one_hot)  # [1, S, 1, N]
    standing = builder.add("Reshape", mask, builder.constant(np.array([0, 0, count, 1])))
    weighed = builder.add("Mul", apart, standing)
    flat = builder.add("Reshape", weighed, builder.constant(np.array([0, 0, count * rho])))
    builder.add("MatMul", flat, all_b, output=y)


class _Builder:
    """Inserts nodes one after the other at a place of a graph."""

    def __init__(self, graph: onnx.GraphProto, name: str, position: int) -> None:
        self._graph, self._name, self._position, self._count = graph, name, position, 0

    def constant(self, array: npt.NDArray[np.generic]) -> str:
        name = self._next()
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def add(self, kind: str, *inputs: str, output: str = "") -> str:
        return self._insert(kind, inputs, [output or self._next()])[0]

    def add_two(self, kind: str, *inputs: str) -> tuple[str, str]:
        first, second = self._insert(kind, inputs, [self._next(), self._next()])
        return first, second

    def _insert(self, kind: str, inputs: tuple[str, ...], outputs: list[str]) -> list[str]:
        self._graph.node.insert(self._position, helper.make_node(kind, inputs, outputs))
        self._position += 1
        return outputs

    def _next(self) -> str:
        self._count += 1
        return f"{self._name}.gated.{self._count}"


def fused_engine(bundle: Bundle, weights: dict[str, float]) -> Engine:
    """Our own engine under one fusion."""
    device = replace(choose_device("cpu", "cpu", None), operators=None)
    backbone = open_backbone(bundle.path(BACKBONE), bundle.manifest.backbone, device)
    engine = make_engine(backbone, bundle.adapters(), CONTEXT)
    engine.decoder.set_fusion(engine.fuser.fuse(weights))
    return engine


def difference(bundle: Bundle, way: str, ids: list[int]) -> float:
    """Largest difference of the logits between gates of zero and our fusion of the first two."""
    first, second = list(bundle.adapters().rows)[:TOP]
    gated = gated_engine(bundle, len(bundle.adapters().rows), way, None).decoder.all_logits(ids)
    fused = fused_engine(bundle, {first: 0.5, second: 0.5}).decoder.all_logits(ids)
    return float(np.abs(gated - fused).max())


def seconds(engine: Engine, ids: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds of a prefill and of a decoded token after it."""
    engine.decoder.truncate(0)
    begun = time.perf_counter()
    token = int(engine.decoder.prefill(ids).argmax())
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token = int(engine.decoder.step([token])[0].argmax())
    return prefilled - begun, (time.perf_counter() - prefilled) / new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    tokenizer = bundle.tokenizer("tokenizer.json")
    ids = tokenizer.encode(HELDOUT.read_text(encoding="utf-8")).ids[: arguments.prompt_tokens]
    for way in ("gather", "dense"):
        print(f"{way}: logits differ from our fusion by {difference(bundle, way, ids[:64]):.2g}")
    engines = dict(_engines(bundle, arguments.adapters))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for engine in engines.values():
        seconds(engine, ids, 8)  # warm up
    for number in range(arguments.rounds):
        for name, engine in engines.items():
            times[name].append(seconds(engine, ids, arguments.new_tokens))
        print(f"round {number + 1}/{arguments.rounds}", file=sys.stderr)
    _print_table(times)


def _engines(bundle: Bundle, sizes: list[int]) -> Iterator[tuple[str, Engine]]:
    first, second = list(bundle.adapters().rows)[:TOP]
    yield "base", fused_engine(bundle, {})
    yield "DLP, two fused", fused_engine(bundle, {first: 0.5, second: 0.5})
    for size in sizes:
        for way in ("gather", "dense"):
            rng = np.random.default_rng(0)
            yield f"top-2 of {size} a token, {way}", gated_engine(bundle, size, way, rng)


def _print_table(times: dict[str, list[tuple[float, float]]]) -> None:
    print("| system | ms a token | decode / base | prefill ms | prefill / base |")
    print("|---|---|---|---|---|")
    for name, rounds in times.items():
        cells = [f"{name} "]
        for column in (1, 0):
            mine = [found[column] for found in rounds]
            ratios = [m / base[column] for m, base in zip(mine, times["base"], strict=True)]
            cells.append(f" {statistics.median(mine) * 1000:.1f} ")
            low, high = min(ratios), max(ratios)
            cells.append(f" {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) ")
        print(f"|{'|'.join([' ' + cells[0], *cells[1:]])}|")


if __name__ == "__main__":
    main()
