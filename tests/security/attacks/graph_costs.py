"""Graphs that would cost without bound: shapes that are not what they seem, operators that take
longer than their multiplications, attributes that two readers read differently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from tests.security.attacks.costs import as_albert, keep
from tests.security.attacks.forge import Attack, replaced
from tests.security.attacks.graphs import on_model

Change = Callable[[Any], object]


def _constant(model: Any, name: str, values: Any, kind: Any = np.int64) -> str:
    array = numpy_helper.from_array(np.asarray(values, kind), name)
    model.graph.initializer.append(array)
    return name


def _node(model: Any, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
    model.graph.node.append(helper.make_node(kind, inputs, [output], **attributes))
    return output


def _keep_range(model: Any, name: str) -> None:
    """Keeps a row of integers."""
    number = _node(model, "Cast", [name], "as_float", to=TensorProto.FLOAT)
    axis = _constant(model, "row_axis", [0])
    keep(model, _node(model, "Unsqueeze", [number, axis], "as_row"))


def _as_bool(model: Any, name: str, number: Any) -> str:
    """1, made of another number."""
    truth = _node(model, "Cast", [_constant(model, name, number)], name + "_bool", to=9)
    return _node(model, "Cast", [truth], name + "_one", to=TensorProto.INT64)


def _reshaped(model: Any) -> None:
    """A column that is a row, multiplied with itself."""
    row = _constant(model, "row", np.ones((1, 10_000)), np.float32)
    sizes = [_as_bool(model, "size", [10_000]), _constant(model, "rest", [-1])]
    shape = _node(model, "Concat", sizes, "shape", axis=0)
    column = _node(model, "Reshape", [row, shape], "column")
    other = _node(model, "Transpose", [column], "other", perm=[1, 0])
    keep(model, _node(model, "MatMul", [other, column], "square"))


def _range_from_one(model: Any) -> None:
    start = _as_bool(model, "start", 1 << 27)
    bounds = [start, _constant(model, "end", 1 << 27), _constant(model, "step", 1)]
    _keep_range(model, _node(model, "Range", bounds, "numbers"))


def _range_from_choice(model: Any) -> None:
    parts = [_constant(model, "no", False, np.bool_), _constant(model, "many", 1 << 27)]
    one = _constant(model, "one", 1)
    start = _node(model, "Where", [*parts, one], "start")
    _keep_range(model, _node(model, "Range", [start, "many", one], "numbers"))


def _range_at_some_lengths(model: Any) -> None:
    """(260 L - L^2 - 16,640) x 30,000 numbers: none at 1 to 64 and at 256 tokens."""
    sizes = _node(model, "Shape", ["input_ids"], "sizes")
    length = _node(model, "Gather", [sizes, _constant(model, "second", 1)], "length", axis=0)
    square = _node(model, "Mul", [length, length], "square")
    start = _node(model, "Mul", [square, _constant(model, "scale", 30_000)], "start")
    many = _node(model, "Mul", [length, _constant(model, "slope", 260 * 30_000)], "many")
    end = _node(model, "Add", [many, _constant(model, "less", -16_640 * 30_000)], "end")
    numbers = _node(model, "Range", [start, end, _constant(model, "step", 1)], "numbers")
    some = [numbers, _constant(model, "some", [1])]
    _keep_range(model, _node(model, "Concat", some, "some_numbers", axis=0))


def _texts(model: Any) -> None:
    """Numbers as texts, of 32 bytes and more each."""
    name = _constant(model, "small", np.full((1, 800_000), 1e-7), np.float32)
    for index in range(6):
        text = _node(model, "Cast", [name], f"text_{index}", to=TensorProto.STRING)
        name = _node(model, "Cast", [text], f"number_{index}", to=TensorProto.FLOAT)
    keep(model, name)


def _product(model: Any, shapes: Sequence[tuple[int, ...]]) -> str:
    """A constant times another, which depends on the input: otherwise it would be kept."""
    name = _node(model, "Cast", ["input_ids"], "input_number", to=TensorProto.FLOAT)
    zero = _constant(model, "first_of", 0)
    for index in range(2):
        name = _node(model, "Gather", [name, zero], f"input_{index}", axis=0)
    for index, shape in enumerate(shapes):
        part = _constant(model, f"part_{index}", np.ones(shape), np.float32)
        name = _node(model, "Mul", [name, part], f"product_{index}")
    return name


def _times(kind: str, count: int, shape: tuple[int, int], inputs: int = 1, **kw: Any) -> Change:
    """An operator applied to a table many times."""

    def change(model: Any) -> None:
        name = _product(model, ((shape[0], 1), (1, shape[1])))
        extra = []
        if kind == "CumSum":
            extra = [_constant(model, "over", 0)]
        if kind == "LayerNormalization":
            extra = [_constant(model, "cost_scales", np.ones(shape[1]), np.float32)]
        for index in range(count):
            name = _node(model, kind, [name] * inputs + extra, f"{kind}_{index}", **kw)
        keep(model, name)

    return change


def _matrices(count: int) -> Change:
    """1.5 million matrices of one number, many times."""

    def change(model: Any) -> None:
        first = name = _product(model, ((1_500, 1, 1, 1), (1, 1_000, 1, 1)))
        for index in range(count):
            name = _node(model, "MatMul", [name, first], f"matrices_{index}")
        zero = _constant(model, "zero", 0)
        for index in range(2):
            name = _node(model, "Gather", [name, zero], f"inner_{index}", axis=0)
        keep(model, name)

    return change


def _two_values(model: Any) -> None:
    """A constant with two values, of which onnxruntime takes the first."""
    node = helper.make_node("Constant", [], ["size"])
    one = numpy_helper.from_array(np.array([1], np.int64))
    for name, value in (("value_ints", [1 << 28]), ("value", one)):
        node.attribute.append(helper.make_attribute(name, value))
    model.graph.node.append(node)
    _keep_range(model, _node(model, "ConstantOfShape", ["size"], "filled"))


def _two_types(model: Any) -> None:
    """An attribute with a number and a list, whose type says list."""
    column = _constant(model, "column", np.ones((4_000, 1)), np.float32)
    node = helper.make_node("Transpose", [column], ["other"])
    attribute = node.attribute.add(name="perm", type=AttributeProto.INTS, i=0)
    attribute.ints.extend([1, 0])
    model.graph.node.append(node)
    keep(model, _node(model, "MatMul", [column, "other"], "square"))


def _attentions(model: Any) -> None:
    """150 more attentions to the whole context."""
    nodes = list(model.graph.node)
    at = next(i for i, node in enumerate(nodes) if node.op_type == "GroupQueryAttention")
    copies = []
    for index in range(150):
        copy = type(nodes[at])()
        copy.CopyFrom(nodes[at])
        copy.name, copy.output[:] = f"copy_{index}", [f"{p}_{index}" for p in ("q", "k", "v")]
        copies.append(copy)
    del model.graph.node[:]
    model.graph.node.extend(nodes[:at] + copies + nodes[at:])


def _attribute(kind: str, name: str, number: int) -> Change:
    """Another number in the first node of a kind."""

    def change(model: Any) -> None:
        node = next(node for node in model.graph.node if node.op_type == kind)
        next(a for a in node.attribute if a.name == name).i = number

    return change


_TABLE = (1_500, 1_000)
_BOTH = {
    "sums of a table": _times("Add", 320, _TABLE, 2),
    "quotients of a table": _times("Div", 320, _TABLE, 2),
    "a table turned": _times("Transpose", 320, _TABLE, perm=[1, 0]),
    "numbers as texts": _texts,
    "matrices of one number": _matrices(300),
}
_BACKBONE = {
    "a column that is a row": _reshaped,
    "an attribute of two types": _two_types,
    "attentions": _attentions,
    "curves of a table": _times("Tanh", 60, _TABLE),
    **{
        f"{kind} with {name} {number}": _attribute(kind, name, number)
        for kind, name, numbers in (
            ("GroupQueryAttention", "num_heads", (0, 400, 1 << 62)),
            ("GroupQueryAttention", "kv_num_heads", (0, -1)),
        )
        for number in numbers
    },
}
_ROUTER = {
    "running sums": _times("CumSum", 100, _TABLE),
    "rows of one": _times("Softmax", 60, (1_500_000, 1), axis=1),
    "rows normalised": _times("LayerNormalization", 60, (1_500_000, 1)),
    "largest of a table": _times("Max", 100, _TABLE, 2),
}
_ALBERT = {
    "a range from a truth": _range_from_one,
    "a range from a choice": _range_from_choice,
    "a range at some lengths": _range_at_some_lengths,
    "a constant of two values": _two_values,
    "powers of a table": _times("Pow", 300, _TABLE, 2),
    "errors of a table": _times("Erf", 400, _TABLE),
    "sums of a table": _times("Add", 3_000, _TABLE, 2),
    "matrices of one number": _matrices(1_000),
}

ATTACKS: dict[str, Attack] = {
    f"{what}: {name}": replaced(file, on_model(change))
    for what, file, changes in (
        ("backbone", "backbone.onnx", {**_BOTH, **_BACKBONE}),
        ("router", "router.onnx", {**_BOTH, **_ROUTER}),
    )
    for name, change in changes.items()
}
ATTACKS |= {f"albert: {name}": as_albert(change) for name, change in _ALBERT.items()}
