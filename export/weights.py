"""Weights of a graph during a rewrite: reads and writes one tensor at a time, so that no export
holds a dense model in memory."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo, set_external_data

Array = npt.NDArray[Any]
SMALL = 1024  # bytes; smaller tensors stay in the graph, where onnxruntime must find shapes
PAGE = 4096  # alignment: onnxruntime memory-maps weights


class WeightFile:
    """The initializers of `graph`: read from `source`, written to `target`.

    The end of the context copies the initializers that are still in use.
    """

    def __init__(self, graph: onnx.GraphProto, source: Path, target: Path) -> None:
        self._graph = graph
        self._source = source
        self._target = target
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._written: set[str] = set()

    def __enter__(self) -> WeightFile:
        self._file = self._target.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                self._copy_rest()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].dims)

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(helper.tensor_dtype_to_np_dtype(self._tensors[name].data_type))

    def read(self, name: str) -> Array:
        """A tensor of the source, mapped where it is large."""
        tensor = self._tensors[name]
        if not tensor.external_data:
            return onnx.numpy_helper.to_array(tensor)
        place = ExternalDataInfo(tensor)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if 0 in tensor.dims:
            return np.empty(tuple(tensor.dims), dtype)
        return np.memmap(
            self._source.parent / place.location,
            dtype,
            mode="r",
            offset=place.offset or 0,
            shape=tuple(tensor.dims),
        )

    def add(self, name: str, array: Array) -> str:
        """Write a tensor under a new name; returns the name."""
        tensor = self._graph.initializer.add()
        tensor.name = name
        self._tensors[name] = tensor
        self._write(tensor, array)
        return name

    def drop(self, name: str) -> None:
        """Remove a tensor of the source, so that the output of a node may take its name."""
        del self._tensors[name]

    def _copy_rest(self) -> None:
        """Drop unused tensors and copy the others to the target."""
        used = {name for node in self._graph.node for name in node.input}
        kept = [
            tensor
            for tensor in self._graph.initializer
            if tensor.name in used and tensor.name in self._tensors
        ]
        for tensor in kept:
            if tensor.name not in self._written and tensor.external_data:
                self._write(tensor, self.read(tensor.name))
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del self._graph.initializer[:]
        self._graph.initializer.extend(copies)

    def _write(self, tensor: onnx.TensorProto, array: Array) -> None:
        data = np.ascontiguousarray(array)
        self._written.add(tensor.name)
        if data.nbytes < SMALL:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
            return
        self._file.write(b"\0" * (-self._file.tell() % PAGE))
        offset = self._file.tell()
        self._file.write(data.data)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(data.dtype)
        del tensor.dims[:]
        tensor.dims.extend(data.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.raw_data = b""
        set_external_data(tensor, self._target.name, offset=offset, length=data.nbytes)
        tensor.ClearField("raw_data")
