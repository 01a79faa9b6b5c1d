"""Backbones with the dimensions of real ones and random weights, built node by node as an export
writes them: what a step costs depends on nothing else. Needs no torch and no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlp_edge.bundle.adapter_stack import AdapterStack, LoraPair, pack
from dlp_edge.bundle.manifest import BackboneEntry, Slot, SlotPart
from dlp_edge.bundle.weight_file import Weights
from dlp_edge.onnx_bytes.protobuf import parts, read_message, write_message
from dlp_edge.onnx_bytes.reader import FLOAT16, GRAPH, INT32, INT64, MODEL, UINT8
from dlp_edge.onnx_bytes.writer import make_model, make_node

MICROSOFT = "com.microsoft"
CONTEXT = 2048
RANK = 8
_LAST = 2  # axis of [B, S, width]
_TYPES = {"float16": FLOAT16, "uint8": UINT8, "int64": INT64, "int32": INT32}


@dataclass(frozen=True)
class Size:
    """Dimensions of a Llama-like backbone."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    head_size: int = 128


SIZES = {
    "tiny": Size(2, 256, 512, 4, 2, 1000, 64),
    "1.5B": Size(28, 1536, 8960, 12, 2, 151936),  # Qwen2.5-1.5B
    "7B": Size(28, 3584, 18944, 28, 4, 152064),  # Qwen2.5-7B
    "8B": Size(32, 4096, 14336, 32, 8, 128256),  # Llama-3.1-8B
}


class RandomBackbone:
    """The graph, its weights and its manifest entry, in half precision.

    The matrices of all layers share one random array of each size, so that building takes little
    memory; on the device each has its own.

    Args:
        form: "int4", "nf4" or "fp16"; as in an export, the embedding is int8 unless it is fp16, and
            so is the head of nf4.
    """

    def __init__(self, size: Size, form: str) -> None:
        self.size, self.form = size, form
        self.weights: Weights = {}
        self._nodes: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []
        self._slots: list[Slot] = []
        self._random = np.random.default_rng(0)
        self._shared: dict[Any, npt.NDArray[Any]] = {}
        self._build()
        tensors = [self._tensor(name, value) for name, value in self.weights.items()]
        model = make_model(self._nodes, self._inputs, self._outputs, [MICROSOFT])
        self.model = _with_tensors(model, tensors)
        self.entry = BackboneEntry(
            name="random",
            fingerprint="0" * 64,
            architecture="LlamaForCausalLM",
            quantisation=form,
            dtype="float16",
            context_length=CONTEXT,
            vocab_size=size.vocab,
            num_layers=size.layers,
            num_kv_heads=size.kv_heads,
            head_size=size.head_size,
            bos_token="",
            eos_token="",
            eos_token_ids=(0,),
            slots=tuple(self._slots),
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a step reads: all but the embedding's."""
        return sum(w.nbytes for name, w in self.weights.items() if not name.startswith("embedding"))

    def adapters(self, count: int) -> AdapterStack:
        """Random adapters of rank RANK on the queries' and values' projections."""
        pairs = {
            part.module: LoraPair(
                self._values((RANK, slot.input_size)),
                self._values((RANK, part.stop - part.start)),
                1.0,
            )
            for slot in self._slots
            for part in slot.parts
        }
        return pack({str(number): pairs for number in range(count)}, "float16")

    def _build(self) -> None:
        size = self.size
        q, kv = size.heads * size.head_size, size.kv_heads * size.head_size
        self._input("input_ids", INT64, ["B", "S"])
        self._input("seqlens_k", INT32, ["B"])
        self._input("total_sequence_length", INT32, [])
        self._input("logit_positions", INT64, ["K"])
        angles = np.outer(np.arange(CONTEXT), 1e4 ** -np.linspace(0, 1, size.head_size // 2))
        self.weights["cosines"] = np.cos(angles).astype(np.float16)
        self.weights["sines"] = np.sin(angles).astype(np.float16)
        x, added = self._embedding(), ""
        for layer in range(size.layers):
            x, y = self._norm(f"{layer}.attention", x, added)
            packed = self._matrix(f"{layer}.qkv", y, size.hidden, q + 2 * kv)
            packed = self._slot(layer, packed, y, q, kv)
            attended = self._attention(layer, packed)
            added = self._matrix(f"{layer}.o", attended, q, size.hidden)
            x, y = self._norm(f"{layer}.mlp", x, added)
            gate_up = self._matrix(f"{layer}.gate_up", y, size.hidden, 2 * size.inner)
            added = self._matrix(
                f"{layer}.down", self._gated(layer, gate_up), size.inner, size.hidden
            )
        _, y = self._norm("final", x, added)
        self._add("Gather", [y, "logit_positions"], "selected", axis=1)
        self._matrix("head", "selected", size.hidden, size.vocab, "logits")
        self._outputs.insert(0, _value("logits", FLOAT16, ["B", "K", size.vocab]))

    def _embedding(self) -> str:
        size = self.size
        if self.form == "fp16":
            self.weights["embedding"] = self._values((size.vocab, size.hidden))
            return self._add("Gather", ["embedding", "input_ids"], "embedded", axis=0)
        self.weights["embedding"] = self._bytes((size.vocab, size.hidden))
        self.weights["embedding_scales"] = self._scales((size.vocab, size.hidden // 32))
        inputs = ["embedding", "input_ids", "embedding_scales"]
        numbers = {"bits": 8, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
        return self._add("GatherBlockQuantized", inputs, "embedded", MICROSOFT, **numbers)

    def _norm(self, name: str, x: str, added: str) -> tuple[str, str]:
        """The residual and its norm."""
        weight = f"{name}_norm"
        self.weights[weight] = np.ones(self.size.hidden, np.float16)
        if not added:
            return x, self._add(
                "SimplifiedLayerNormalization", [x, weight], f"{name}/normed", axis=_LAST
            )
        outputs = [f"{name}/normed", "", "", f"{name}/sum"]
        kind = "SkipSimplifiedLayerNormalization"
        self._nodes.append(make_node(kind, [x, added, weight], outputs, MICROSOFT))
        return outputs[3], outputs[0]

    def _matrix(self, name: str, x: str, k: int, n: int, output: str = "") -> str:
        output = output or f"{name}/out"
        if self.form == "fp16":
            self.weights[name] = self._values((k, n))
            return self._add("MatMul", [x, name], output)
        if self.form == "nf4" and name != "head":
            self.weights[f"{name}_levels"] = self._bytes((n * k // 2,))
            self.weights[f"{name}_absmax"] = self._scales((n * k // 64,))
            inputs = [x, f"{name}_levels", f"{name}_absmax"]
            numbers = {"K": k, "N": n, "block_size": 64, "quant_type": 1}
            return self._add("MatMulBnb4", inputs, output, MICROSOFT, **numbers)
        bits = 8 if self.form == "nf4" else 4
        self.weights[f"{name}_levels"] = self._bytes((n, k // 32, 4 * bits))
        self.weights[f"{name}_scales"] = self._scales((n, k // 32))
        inputs = [x, f"{name}_levels", f"{name}_scales"]
        if bits == 4:
            self.weights[f"{name}_zeros"] = self._bytes((n, -(-k // 64)))
            inputs.append(f"{name}_zeros")
        numbers = {"K": k, "N": n, "bits": bits, "block_size": 32}
        return self._add("MatMulNBits", inputs, output, MICROSOFT, **numbers)

    def _slot(self, layer: int, base: str, x: str, q: int, kv: int) -> str:
        name, hidden, width = f"model.layers.{layer}.attn.qkv_proj", self.size.hidden, q + 2 * kv
        self._input(f"{name}.A", FLOAT16, ["G", "rank", hidden])
        self._input(f"{name}.B", FLOAT16, ["G", "rank", width])
        down = self._add("FusedMatMul", [x, f"{name}.A"], f"{name}/down", MICROSOFT, transB=1)
        up = self._add("MatMul", [down, f"{name}.B"], f"{name}/up")
        parts = (SlotPart(f"{layer}.q", 0, q), SlotPart(f"{layer}.v", q + kv, width))
        self._slots.append(Slot(name, hidden, width, parts))
        return self._add("Add", [base, up], f"{name}/out")

    def _attention(self, layer: int, packed: str) -> str:
        size, names = self.size, [f"{layer}.key", f"{layer}.value"]
        shape = ["B", size.kv_heads, "T", size.head_size]
        for name in names:
            self._input(f"past_key_values.{name}", FLOAT16, shape)
            self._outputs.append(_value(f"present.{name}", FLOAT16, shape))
        past = [f"past_key_values.{name}" for name in names]
        inputs = [packed, "", "", *past, "seqlens_k", "total_sequence_length", "cosines", "sines"]
        outputs = [f"{layer}/attended", *(f"present.{name}" for name in names)]
        numbers = {"num_heads": size.heads, "kv_num_heads": size.kv_heads, "do_rotary": 1}
        kind = "GroupQueryAttention"
        self._nodes.append(make_node(kind, inputs, outputs, MICROSOFT, **numbers))
        return outputs[0]

    def _gated(self, layer: int, gate_up: str) -> str:
        gate, up = f"{layer}/gate", f"{layer}/up"
        self._nodes.append(make_node("Split", [gate_up], [gate, up], axis=_LAST, num_outputs=2))
        sigmoid = self._add("Sigmoid", [gate], f"{layer}/sigmoid")
        act = self._add("Mul", [gate, sigmoid], f"{layer}/act")
        return self._add("Mul", [act, up], f"{layer}/gated")

    def _add(
        self, kind: str, inputs: list[str], output: str, domain: str = "", **numbers: int
    ) -> str:
        self._nodes.append(make_node(kind, inputs, [output], domain, **numbers))
        return output

    def _input(self, name: str, dtype: int, shape: list[str | int]) -> None:
        self._inputs.append(_value(name, dtype, shape))

    def _bytes(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        return self._once(("bytes", shape), lambda: self._random.integers(0, 256, shape, np.uint8))

    def _scales(self, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
        return self._once(("scales", shape), lambda: np.full(shape, 1e-3, np.float16))

    def _values(self, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
        def make() -> npt.NDArray[np.float16]:
            return (self._random.random(shape, np.float32) * 0.04 - 0.02).astype(np.float16)

        return self._once(("values", shape), make)

    def _once(self, key: Any, make: Any) -> npt.NDArray[Any]:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _tensor(self, name: str, value: npt.NDArray[Any]) -> bytes:
        """A TensorProto whose bytes are given to onnxruntime apart."""
        place = [(b"location", b"none"), (b"offset", b"0"), (b"length", b"%d" % value.nbytes)]
        return write_message(
            {
                1: list(value.shape),
                2: [_TYPES[value.dtype.name]],
                8: [name.encode()],
                13: [write_message({1: [key], 2: [said]}) for key, said in place],
                14: [1],
            }
        )


def _value(name: str, dtype: int, shape: list[str | int]) -> bytes:
    sizes = [
        write_message({2: [size.encode()]} if isinstance(size, str) else {1: [size]})
        for size in shape
    ]
    tensor = write_message({1: [dtype], 2: [write_message({1: sizes})]})
    return write_message({1: [name.encode()], 2: [write_message({1: [tensor]})]})


def _with_tensors(model: bytes, tensors: list[bytes]) -> bytes:
    message = read_message(memoryview(model), MODEL)
    graph = read_message(parts(message, 7)[0], GRAPH)
    return write_message({**message, 7: [write_message({**graph, 5: tensors})]})
