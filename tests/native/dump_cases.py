"""Writes cases for `host.c`: what the operator and two small backbones compute here.

    python -m tests.native.dump_cases FOLDER

Linear must give the same bits elsewhere, with the same kernels. A backbone's other nodes are
onnxruntime's, whose results differ in the last digits from compiler to compiler.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.files import BACKBONE_DATA
from dlp_edge.onnx_bytes.reader import FLOAT, FLOAT16, INT64, UINT8
from dlp_edge.onnx_bytes.writer import make_model, make_node, make_value
from dlp_edge.runtime.engine.device import choose_device, open_session
from dlp_edge.runtime.engine.graphs.operator_graph import with_operators
from dlp_edge.runtime.engine.operators import DOMAIN
from tests.testing.paths import TINY

Tensors = dict[str, npt.NDArray[Any]]
INT32 = 6  # ONNX's number of the type
TYPES = {"float32": FLOAT, "float16": FLOAT16, "int64": INT64, "uint8": UINT8, "int32": INT32}
LINEAR_CASES = 60
BACKBONE_TOLERANCE = 1e-3
TOKENS = 12


class Cases:
    """The file of cases, and the models beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[bytes] = []
        self._device = choose_device("cpu", "cpu", 2)
        self.count = 0

    def add(
        self, name: str, model: bytes, inputs: Tensors, output: str, tolerance: float = 0
    ) -> None:
        path = self._folder / name
        path.write_bytes(model)
        session = open_session(model, self._device, folder=path.parent)
        [expected] = session.run([output], inputs)
        self._bytes(name.encode())
        self._numbers(len(inputs))
        for key, array in inputs.items():
            self._bytes(key.encode())
            self._numbers(TYPES[array.dtype.name], array.ndim, *array.shape)
            self._bytes(array.tobytes())
        self._bytes(output.encode())
        self._numbers(round(tolerance * 1e9))
        self._bytes(expected.tobytes())
        self.count += 1

    def write(self) -> None:
        (self._folder / "cases").write_bytes(struct.pack("<q", self.count) + b"".join(self._parts))

    def _numbers(self, *numbers: int) -> None:
        self._parts.append(struct.pack(f"<{len(numbers)}q", *numbers))

    def _bytes(self, data: bytes) -> None:
        self._numbers(len(data))
        self._parts.append(data)


def add_linear(cases: Cases, rng: np.random.Generator) -> None:
    bits, rows, blocks, tokens = (
        int(rng.integers(*ends)) for ends in ((1, 3), (1, 300), (1, 40), (1, 40))
    )
    bits *= 4
    width = blocks * 32 - int(rng.integers(0, 32))
    inputs: Tensors = {
        "x": rng.standard_normal((1, tokens, width)).astype(np.float32),
        "levels": rng.integers(0, 256, (rows, blocks, 4 * bits)).astype(np.uint8),
        "scales": rng.uniform(0.01, 0.1, (rows, blocks)).astype(
            np.float16 if rng.random() < 0.5 else np.float32
        ),
    }
    attributes: dict[str, int | list[int]] = {"bits": bits}
    names = [*inputs, ""]
    if bits == 4:
        inputs["zeros"] = rng.integers(0, 256, (rows, -(-blocks // 2))).astype(np.uint8)
        names[-1] = "zeros"
    if rng.random() < 0.5:
        rank, count = int(rng.integers(0, 20)), int(rng.integers(1, 4))
        spans = np.zeros((1, 1, count, 3), np.int64)
        spans[..., 1:] = rank * width, rank
        inputs["adapters"] = rng.standard_normal(rank * (width + rows) + 1).astype(np.float16)
        inputs["spans"] = spans
        inputs["weights"] = rng.standard_normal((1, 1, count)).astype(np.float32)
        names += ["adapters", "spans", "weights"]
        attributes |= {"slot": 1, "first": 0, "starts": [0], "columns": [rows]}
    values = [make_value(name, TYPES[a.dtype.name], a.ndim) for name, a in inputs.items()]
    node = make_node("Linear", names, ["y"], DOMAIN, **attributes)
    model = make_model([node], values, [make_value("y", FLOAT, 3)], (DOMAIN,))
    cases.add(f"{cases.count}.onnx", model, inputs, "y")


def add_backbone(cases: Cases, path: Path, folder: Path, rng: np.random.Generator) -> None:
    """A prompt of TOKENS tokens with two random adapters in every slot."""
    bundle = open_bundle(path)
    entry = bundle.manifest.backbone
    own = folder / path.name
    own.mkdir(exist_ok=True)
    (own / BACKBONE_DATA).write_bytes((path / BACKBONE_DATA).read_bytes())
    model, _ = with_operators(bundle.graph()[0], entry.slots, lambda name: False)
    spans = np.zeros((1, 64, 2, 3), np.int64)
    spans[..., 0] = 0, 5000
    spans[..., 1] = 10_000, 15_000
    spans[..., 2] = 4
    empty = np.zeros((1, entry.num_kv_heads, 0, entry.head_size), np.float32)
    caches = {
        f"past_key_values.{layer}.{side}": empty
        for layer in range(entry.num_layers)
        for side in ("key", "value")
    }
    inputs: Tensors = {
        "input_ids": rng.integers(40, 200, (1, TOKENS)),
        **caches,
        "logit_positions": np.arange(TOKENS),
        "seqlens_k": np.array([TOKENS - 1], np.int32),
        "total_sequence_length": np.array(TOKENS, np.int32),
        "fusion.adapters": (rng.standard_normal(20_000) * 0.05).astype(np.float16),
        "fusion.spans": spans,
        "fusion.weights": np.ones((1, 64, 2), np.float32),
    }
    cases.add(f"{path.name}/backbone.onnx", model, inputs, "logits", BACKBONE_TOLERANCE)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    cases, rng = Cases(folder), np.random.default_rng(0)
    for _ in range(LINEAR_CASES):
        add_linear(cases, rng)
    for name in ("int8", "int4"):
        add_backbone(cases, TINY / name, folder, rng)
    cases.write()
    print(f"{cases.count} cases")


if __name__ == "__main__":
    main()
