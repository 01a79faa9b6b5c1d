"""A minimal case of wrong attention on WebGPU: `python -m benchmarks.gpu.webgpu_attention`.

One GroupQueryAttention node with the cache bound in place, on the CPU and on onnxruntime's WebGPU
plugin, for passes of several lengths over an empty and a filled cache. Needs onnxruntime and
onnxruntime-ep-webgpu; on Mesa's lavapipe, ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from dlp_edge.onnx_bytes.reader import FLOAT, INT32
from dlp_edge.onnx_bytes.writer import make_model, make_node, make_value
from dlp_edge.runtime.engine.providers import webgpu_devices

HEADS, KV_HEADS, SIZE, CACHE = 4, 2, 64, 128
NODE = "GroupQueryAttention"
INPUTS = {"qkv": 3, "past_key": 4, "past_value": 4}


def main() -> None:
    print("tokens  past  rows wrong  largest difference")
    for past in (0, 40):
        for tokens in (1, 8, 16, 24, 31, 32, 33, 48, 64):
            cpu, gpu = (attend(tokens, past, kind) for kind in ("cpu", "webgpu"))
            difference = np.abs(cpu - gpu).max(axis=-1)[0]
            wrong = int((difference > 1e-3).sum())
            print(f"{tokens:6} {past:5} {wrong:6} of {tokens:2} {difference.max():12.5f}")


def attend(tokens: int, past: int, kind: str) -> np.ndarray:
    """The node's output [1, S, HEADS * SIZE] for random queries, keys and values."""
    random = np.random.default_rng(0)
    cache = np.zeros((2, 1, KV_HEADS, CACHE, SIZE), np.float32)
    cache[:, :, :, :past] = random.standard_normal((2, 1, KV_HEADS, past, SIZE))
    width = (HEADS + 2 * KV_HEADS) * SIZE
    values = {
        "qkv": random.standard_normal((1, tokens, width)).astype(np.float32),
        "past_key": cache[0],
        "past_value": cache[1],
        "seqlens": np.array([past + tokens - 1], np.int32),
    }
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if kind == "webgpu":
        options.add_provider_for_devices(webgpu_devices(), {})
        session = ort.InferenceSession(model(), options)
    else:
        session = ort.InferenceSession(model(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    bound = {name: ort.OrtValue.ortvalue_from_numpy(v, kind) for name, v in values.items()}
    bound["total"] = ort.OrtValue.ortvalue_from_numpy(np.array(past + tokens, np.int32))
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    for side in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{side}", bound[f"past_{side}"])
    out = np.zeros((1, tokens, HEADS * SIZE), np.float32)
    result = ort.OrtValue.ortvalue_from_numpy(out, kind)
    binding.bind_ortvalue_output("out", result)
    session.run_with_iobinding(binding)
    return np.array(result.numpy())


def model() -> bytes:
    inputs = ["qkv", "", "", "past_key", "past_value", "seqlens", "total"]
    outputs = ["out", "present_key", "present_value"]
    numbers = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    node = make_node(NODE, inputs, outputs, "com.microsoft", **numbers)
    given = [make_value(name, FLOAT, rank) for name, rank in INPUTS.items()]
    lengths = [make_value("seqlens", INT32, 1), make_value("total", INT32, 0)]
    made = [make_value("out", FLOAT, 3), *(make_value(name, FLOAT, 4) for name in outputs[1:])]
    return make_model([node], [*given, *lengths], made, ["com.microsoft"])


if __name__ == "__main__":
    main()
