"""Graphs whose cost is fuzzed: a good graph to which a chain of operators is added.

A step is [operator, picks, number]: which earlier values it takes, and what its attribute or
constant is. A step that does not fit the values so far is left out, so that chains stay valid
where they are cut and joined. What the check accepts is loaded and run in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.graph_allowlist import (
    BACKBONE_OPERATORS,
    ROUTER_OPERATORS,
    SPLITTER_OPERATORS,
    check_router,
    check_splitter,
)
from dlp_edge.errors import DlpEdgeError
from dlp_edge.onnx_bytes.reader import Node, Tensor
from dlp_edge.onnx_bytes.shape_rules import Array, constant_of, outputs_of
from dlp_edge.runtime.routing.small_session import open_small
from dlp_edge.runtime.runtime import Runtime
from tests.security.attacks.forge import vouch
from tests.testing.paths import TINY

Step = list[Any]

MAX_ADDRESSES, MAX_CPU = 4 << 30, 30
_NUMBERS = (-1, 0, 1, 2, 3, 8, 77, 1_000, 20_000, 1 << 20, 1 << 31, 1 << 40)
_SIZES = (1, 1, 2, 3, 16, 100, 1_000, 4_000)
_AXIS = ("Concat", "Gather", "Softmax", "Split", "Flatten", "LayerNormalization")
_AXES = ("Unsqueeze", "Squeeze", "ReduceMax", "ReduceSum", "CumSum")
_TYPES = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.INT32)
_ARITY = {
    **dict.fromkeys(
        "Add And Concat Div Equal FusedMatMul Gather Gemm Greater GreaterOrEqual LayerNormalization"
        " MatMul Max Mul Pow Sub Expand Reshape Pad".split(),
        2,
    ),
    **dict.fromkeys(("Where", "Range", "Slice"), 3),
}
_BROADCASTING = "Add And Div Equal Greater GreaterOrEqual Max Mul Pow Sub Where Expand".split()
_LARGEST = 1 << 18  # elements of a constant of the chain
_TIMES_FILE = 4  # a graph is read, parsed, and its weights are packed


def step(rng: random.Random, operators: list[str]) -> Step:
    """A random step: an operator, or a constant."""
    kind = rng.choice([*operators, "floats", "integers", "integers", "number"])
    return [kind, [rng.randrange(64) for _ in range(4)], rng.choice(_NUMBERS)]


class _Builder:
    """Adds steps to a graph and follows types and shapes."""

    def __init__(self, model: Any, tokens: int) -> None:
        self._graph = model.graph
        self._count = 0
        self._names: list[str] = []
        self._arrays: dict[str, Array] = {}
        self._types: dict[str, int] = {}
        for value in model.graph.input:
            if value.type.tensor_type.elem_type == TensorProto.INT64:
                rank = len(value.type.tensor_type.shape.dim)
                self._put(value.name, Array((1, tokens)[-rank:]), TensorProto.INT64)

    def _put(self, name: str, array: Array, kind: int) -> None:
        self._names.append(name)
        self._arrays[name], self._types[name] = array, kind

    def _new(self) -> str:
        self._count += 1
        return f"fuzz_{self._count}"

    def _constant(self, array: Any) -> str:
        name = self._new()
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        tensor = Tensor(name, TensorProto.INT64, array.shape, memoryview(array.tobytes()))
        known = constant_of(tensor) if array.dtype == np.int64 else Array(array.shape)
        self._put(name, known, helper.np_dtype_to_tensor_dtype(array.dtype))
        return name

    def add(self, step: Step) -> None:
        """Adds a step where it fits."""
        kind, picks, number = step
        if kind == "floats":
            shape = tuple(_SIZES[pick % len(_SIZES)] for pick in picks[: 1 + number % 3])
            if np.prod(shape) <= _LARGEST:
                self._constant(np.ones(shape, np.float32))
            return
        if kind == "integers":
            values = [number, *(_NUMBERS[p % len(_NUMBERS)] for p in picks)][: 1 + picks[0] % 4]
            self._constant(np.array(values, np.int64))
            return
        if kind == "number":
            self._constant(np.array(number, np.int64))
            return
        with contextlib.suppress(ValueError, IndexError, KeyError, TypeError, OverflowError):
            self._operator(kind, picks, number)

    def _operator(self, kind: str, picks: list[int], number: int) -> None:
        domain, _, kind = kind.rpartition(".")
        inputs = [self._names[-1 - p % len(self._names)] for p in picks[: _ARITY.get(kind, 1)]]
        numbers: dict[str, Any] = {}
        if kind in _AXIS:
            numbers["axis"] = number % 4 - 1
        if kind in _AXES:
            axes = np.array([number % 3], np.int64)
            inputs.append(self._constant(axes[0] if kind == "CumSum" else axes))
        if kind == "Cast":
            numbers["to"] = _TYPES[number % len(_TYPES)]
        if kind in ("FusedMatMul", "Gemm"):
            numbers |= {"transA": number & 1, "transB": number >> 1 & 1}
        if kind == "Transpose" and number != -1:
            rank = len(self._arrays[inputs[0]].shape)
            numbers["perm"] = [(i + number) % rank for i in range(rank)]
        types = [self._types[name] for name in inputs]
        made = helper.make_node(kind, inputs, [self._new()], domain=domain, **numbers)
        integers = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in numbers.items()}
        node = Node(kind, tuple(inputs), tuple(made.output), integers, {})
        outputs, _ = outputs_of(node, [self._arrays[name] for name in inputs])
        if kind == "Where" and types[0] != TensorProto.BOOL:
            return
        if kind not in _AXES and kind != "Gather" and len(set(types[kind == "Where" :])) > 1:
            return
        if not _fit(kind, [self._arrays[name].shape for name in inputs], numbers):
            return
        self._graph.node.append(made)
        self._put(made.output[0], outputs[0], self._type(kind, types, numbers))

    @staticmethod
    def _type(kind: str, types: list[int], numbers: dict[str, Any]) -> int:
        if kind == "Cast":
            return int(numbers["to"])
        if kind in ("Equal", "Greater", "GreaterOrEqual", "And"):
            return TensorProto.BOOL
        return TensorProto.INT64 if kind == "Shape" else types[kind == "Where"]

    def finish(self) -> None:
        """Adds zero times the last values to the first output, so that they are computed."""
        graph = self._graph
        used = {name for node in graph.node for name in node.input}
        loose = [n for n in self._names if n.startswith("fuzz_") and n not in used][-3:]
        output = graph.output[0].name
        for node in graph.node:
            node.output[:] = ["fuzz_before" if n == output else n for n in node.output]
        total = "fuzz_before"
        for index, name in enumerate(loose):
            size, number, new = f"size_{index}", f"float_{index}", f"sum_{index}"
            rank = len(self._arrays[name].shape)
            zero = self._constant(np.array(0, np.int64))
            for level in range(rank):
                graph.node.append(
                    helper.make_node("Gather", [name, zero], [f"{size}_{level}"], axis=0)
                )
                name = f"{size}_{level}"
            kind = {"to": TensorProto.FLOAT}
            graph.node.append(helper.make_node("Cast", [name], [number], **kind))
            graph.node.append(helper.make_node("Add", [total, number], [new]))
            total = new
        if loose:
            graph.node[-1].output[0] = output
        else:
            for node in graph.node:
                node.output[:] = [output if n == "fuzz_before" else n for n in node.output]


def _fit(kind: str, shapes: list[tuple[int, ...]], numbers: dict[str, Any]) -> bool:
    """Whether onnxruntime would accept these shapes; what it refuses costs nothing."""
    if "MatMul" in kind or kind == "Gemm":
        left, right = (shape[-2:] for shape in shapes)
        inner = left[0] if numbers.get("transA") else left[-1]
        return inner == (right[-1] if numbers.get("transB") else right[0])
    if kind in _BROADCASTING:
        rows = zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
        return all(len(set(row) - {1}) <= 1 for row in rows)
    return kind != "Slice" or all(len(shape) == 1 for shape in shapes[1:])


def build(good: bytes, chain: list[Step], tokens: int) -> bytes:
    """The bytes of a good graph with a chain added."""
    model = onnx.load_model_from_string(good)
    builder = _Builder(model, tokens)
    for one in chain:
        builder.add(one)
    builder.finish()
    data: bytes = model.SerializeToString()
    return data


def _albert() -> bytes:
    """A graph of the smallest kind, to which the operators on shapes may be added."""
    model = onnx.load(TINY / "bundle" / "router.onnx")
    del model.graph.node[:], model.graph.initializer[:]
    width = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    features = numpy_helper.from_array(np.ones((1, width), np.float32), "features_made")
    model.graph.initializer.append(features)
    model.graph.node.append(helper.make_node("Identity", ["features_made"], ["features"]))
    data: bytes = model.SerializeToString()
    return data


def _splitter() -> bytes:
    """ids, gaps [1, L] -> scores [1, L, 8]."""
    table = numpy_helper.from_array(np.ones((99, 8), np.float32), "table")
    values = [
        helper.make_tensor_value_info(name, TensorProto.INT64, [None, None])
        for name in ("ids", "gaps")
    ]
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, None, None])
    node = helper.make_node("Gather", ["table", "ids"], ["scores"])
    graph = helper.make_graph([node], "graph", values, [scores], [table])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return data


_entry = open_bundle(TINY / "bundle").manifest.router


def _run_small(data: bytes, check: Callable[[bytes], object], lengths: tuple[int, ...]) -> None:
    check(data)
    session = open_small(data)
    for tokens in lengths:
        ids = np.zeros((1, tokens), np.int64)
        session.run(None, {value.name: ids for value in session.get_inputs()})


def _router(architecture: str) -> Callable[[bytes], None]:
    assert _entry is not None
    entry = replace(_entry, architecture=architecture)
    return lambda data: _run_small(data, lambda d: check_router(d, entry), (1, 77, 256))


def _backbone(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(TINY / "bundle", Path(folder) / "bundle"))
        (bundle / "backbone.onnx").write_bytes(data)
        vouch(bundle, "backbone.onnx", data)
        with Runtime(bundle, threads=1) as runtime:
            for text in ("Hello", "a" * 600):
                with contextlib.suppress(DlpEdgeError):
                    runtime.generate(text, max_new_tokens=2)


_GRAPHS: dict[str, tuple[bytes, int, Callable[[bytes], None], frozenset[str]]] = {
    "router": (
        (TINY / "bundle" / "router.onnx").read_bytes(), 256, _router("mlp"),
        ROUTER_OPERATORS["mlp"],
    ),
    "albert": (_albert(), 256, _router("albert"), ROUTER_OPERATORS["albert"]),
    "backbone": (
        (TINY / "bundle" / "backbone.onnx").read_bytes(), 512, _backbone, BACKBONE_OPERATORS
    ),
    "splitter": (
        _splitter(), 1024, lambda d: _run_small(d, check_splitter, (1, 1024)), SPLITTER_OPERATORS
    ),
}  # fmt: skip
KINDS = tuple(_GRAPHS)


def operators_of(kind: str) -> list[str]:
    """The operators of a kind of graph that a step may add."""
    return sorted(
        name
        for name in _GRAPHS[kind][3]
        if not name.startswith("com.microsoft.") or name.endswith("FusedMatMul")
    )


def prepared(kind: str, chain: list[Step]) -> tuple[Callable[[], None], int]:
    """A call that checks, loads and runs a graph in this process, whose errors are outcomes and
    not finds; and the megabytes that the file's own size accounts for."""
    good, tokens, use, _ = _GRAPHS[kind]
    data = build(good, chain, tokens)

    def call() -> None:
        try:
            use(data)
        except (MemoryError, Exception) as error:  # onnxruntime raises its own types
            if os.environ.get("DLP_EDGE_FUZZ_VERBOSE"):
                traceback.print_exception(error)

    return call, (_TIMES_FILE * len(data)) >> 20


def in_child(call: Callable[[], tuple[float, int]]) -> tuple[float, int, str]:
    """Calls in a child with limits: its seconds, megabytes, and the signal that ended it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        if not os.environ.get("DLP_EDGE_FUZZ_VERBOSE"):  # onnxruntime and panics write to it
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESSES, MAX_ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU, MAX_CPU))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            os.write(writer, repr(call()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status, used = os.wait4(child, 0)
    if told:
        seconds, megabytes = (float(part) for part in told.decode().strip("()").split(","))
        return seconds, int(megabytes), ""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    name = signal.Signals(number).name if number else f"exit {status}"
    return used.ru_utime + used.ru_stime, used.ru_maxrss >> 10, name
