"""Attacks by the two ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.security.attacks.forge import Attack, replaced

Change = Callable[[bytes], bytes]


def on_model(change: Callable[[Any], object]) -> Change:
    """Changes the parsed model."""

    def content(data: bytes) -> bytes:
        model = onnx.load_model_from_string(data)
        change(model)
        written: bytes = model.SerializeToString()
        return written

    return content


def _outside(key: str, value: str) -> Callable[[Any], object]:
    """Changes where the first external tensor lies."""

    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.data_location == 1)
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return change


def _node(kind: str, domain: str = "") -> Callable[[Any], object]:
    return lambda m: m.graph.node.append(helper.make_node(kind, [], ["x"], "x", domain=domain))


def _subgraph(model: Any) -> None:
    inner = helper.make_graph([], "inner", [], [])
    model.graph.node[0].attribute.append(helper.make_attribute("body", inner))


def _function(model: Any) -> None:
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("", "Add", [], [], [], opsets))


def _overlap(model: Any) -> None:
    outside = [t for t in model.graph.initializer if t.data_location == 1]
    twin = model.graph.initializer.add()
    twin.CopyFrom(outside[0])
    twin.name = "twin"


def _attribute_outside(model: Any) -> None:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "t")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    attribute = helper.make_attribute("value", tensor)
    model.graph.node.append(helper.make_node("Constant", [], ["x"], "x"))
    model.graph.node[-1].attribute.append(attribute)


def _shape(value: Any, index: int, size: int) -> None:
    value.type.tensor_type.shape.dim[index].dim_value = size


_BOTH: dict[str, Change] = {
    "empty": lambda data: b"",
    "no protobuf": lambda data: b"\xff" * 1_000,
    "cut": lambda data: data[: len(data) // 2],
    "trailing bytes": lambda data: data + b"\x00",
    "a second graph": lambda data: data + b"\x3a\x02\x12\x00",
    "a length beyond the file": lambda data: b"\x3a\xff\xff\xff\xff\x7f" + data,
    "a varint without end": lambda data: b"\x08" + b"\xff" * 20,
    "a varint longer than needed": lambda data: b"\x28\x80\x00" + data,
    "an unknown field": lambda data: data + b"\xf8\x07\x01",
    "a group": lambda data: data + b"\x0b\x0c",
    "pickled": lambda data: b"\x80\x04cos\nsystem\n(S'id'\ntR.",
    "an operator of a library": on_model(_node("Evil", "evil.so")),
    "a custom domain": on_model(lambda m: m.opset_import.append(helper.make_opsetid("evil", 1))),
    "a loop": on_model(_node("Loop")),
    "an if": on_model(_node("If")),
    "a scan": on_model(_node("Scan")),
    "a sequence": on_model(_node("SequenceMap")),
    "random numbers": on_model(_node("RandomNormal")),
    "a compiled context": on_model(_node("EPContext", "com.microsoft")),
    "a regular expression": on_model(_node("RegexFullMatch")),
    "a tile": on_model(_node("Tile")),
    "a resize": on_model(_node("Resize")),
    "a subgraph": on_model(_subgraph),
    "a function over an operator": on_model(_function),
    "training": on_model(lambda m: m.training_info.add()),
    "metadata": on_model(lambda m: m.metadata_props.add(key="x", value="y")),
    "a sparse tensor": on_model(lambda m: m.graph.sparse_initializer.add()),
    "a quantisation note": on_model(lambda m: m.graph.quantization_annotation.add()),
    "an input more": on_model(
        lambda m: m.graph.input.append(helper.make_tensor_value_info("x", 1, [1]))
    ),
    "an input less": on_model(lambda m: m.graph.input.pop()),
    "an input twice": on_model(lambda m: m.graph.input.append(m.graph.input[0])),
    "an input of another type": on_model(
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 8)
    ),
    "an input that is a sequence": on_model(
        lambda m: m.graph.input[0].CopyFrom(
            helper.make_tensor_sequence_value_info("input_ids", 7, [1])
        )
    ),
    "an input of no rank": on_model(
        lambda m: m.graph.input[0].type.tensor_type.ClearField("shape")
    ),
    "an output more": on_model(
        lambda m: m.graph.output.append(helper.make_tensor_value_info("x", 1, [1]))
    ),
    "an output less": on_model(lambda m: m.graph.output.pop()),
    "an output of another type": on_model(
        lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 7)
    ),
    "an output of another width": on_model(lambda m: _shape(m.graph.output[0], -1, 7)),
    "a tensor twice": on_model(lambda m: m.graph.initializer.append(m.graph.initializer[0])),
    "a tensor of texts": on_model(
        lambda m: m.graph.initializer.append(helper.make_tensor("x", 8, [1], [b"x"]))
    ),
    "a tensor of too few bytes": on_model(
        lambda m: m.graph.initializer.add(name="x", data_type=1, dims=[9], raw_data=b"1234")
    ),
    "a tensor of a terabyte": on_model(
        lambda m: m.graph.initializer.add(name="x", data_type=1, dims=[1 << 38])
    ),
    "a tensor of a negative size": on_model(
        lambda m: m.graph.initializer.add(name="x", data_type=1, dims=[-1], raw_data=b"1234")
    ),
    "a tensor of many dimensions": on_model(
        lambda m: m.graph.initializer.add(name="x", data_type=2, dims=[1] * 99, raw_data=b"1")
    ),
    "a tensor of an unknown type": on_model(
        lambda m: m.graph.initializer.add(name="x", data_type=99, dims=[1], raw_data=b"1")
    ),
    "an attribute in another file": on_model(_attribute_outside),
    "a million nodes": on_model(
        lambda m: m.graph.node.extend([helper.make_node("Add", ["a", "a"], ["a"])] * 100_001)
    ),
    "a name of a megabyte": on_model(
        lambda m: m.graph.node.append(helper.make_node("Add", ["a" * (1 << 20)] * 2, ["b"]))
    ),
}
_BACKBONE: dict[str, Change] = {
    f"external {key} {value[:24]!r}": on_model(_outside(key, value))
    for key, values in {
        "location": [
            "/etc/passwd", "../tokenizer.json", "./backbone.onnx.data", "adapters.safetensors",
            "BACKBONE.ONNX.DATA", "", "*/_ORT_MEM_ADDR_/*", "backbone.onnx.data\x00x",
        ],
        "offset": ["-1", "1e3", "99999999999", "18446744073709551615", " 0", "0x10", "٣"],
        "length": ["0", "-4", "1", "99999999999999999999", ""],
    }.items()
    for value in values
}  # fmt: skip
_BACKBONE |= {
    "a tensor in two places": on_model(
        lambda m: setattr(next(t for t in m.graph.initializer if t.data_location), "raw_data", b"1")
    ),
    "tensors that share bytes": on_model(_overlap),
    "a cache of other heads": on_model(lambda m: _shape(m.graph.input[1], 1, 9)),
    "an input that is a constant": on_model(
        lambda m: m.graph.initializer.append(
            numpy_helper.from_array(np.zeros((1, 1), np.int64), "input_ids")
        )
    ),
}


def _not_finite(model: Any) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            array = numpy_helper.to_array(tensor).copy()
            array.flat[0] = np.nan
            tensor.raw_data = array.tobytes()
            return


_ROUTER: dict[str, Change] = {
    "a weight is NaN": on_model(_not_finite),
    "features without a width": on_model(
        lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_param", "F")
    ),
    "a range": on_model(_node("Range")),
    "a shape filled": on_model(_node("ConstantOfShape")),
    "a weight in another file": on_model(
        lambda m: m.graph.initializer.add(
            name="x",
            data_type=2,
            dims=[1],
            data_location=1,
            external_data=[onnx.StringStringEntryProto(key="location", value="/etc/passwd")],
        )
    ),
}

ATTACKS: dict[str, Attack] = {
    f"{what}: {name}": replaced(file, change)
    for file, what, changes in (
        ("backbone.onnx", "graph", {**_BOTH, **_BACKBONE}),
        ("router.onnx", "router graph", {**_BOTH, **_ROUTER}),
    )
    for name, change in changes.items()
}
