"""Builds an ONNX graph node by node: fewer nodes than a trace, fp16 weights in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

OPSET = 17
Shape = Sequence[int | str]


class GraphBuilder:
    """Collects the nodes and weights of one ONNX graph."""

    def __init__(self, name: str) -> None:
        self._name = name
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

    def model(
        self, inputs: Mapping[str, tuple[int, Shape]], outputs: Mapping[str, tuple[int, Shape]]
    ) -> onnx.ModelProto:
        """The graph, checked; values are name -> (ONNX element type, shape)."""
        graph = helper.make_graph(
            self._nodes,
            self._name,
            [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
            [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
            self._initializers,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model
