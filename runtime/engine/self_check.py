"""Compare a device with the CPU on the backbone's first layers, before its answers are trusted.

A GPU's driver may compute a kernel wrongly, and only for some shapes. The check runs the layers'
real weights and random adapters over random tokens, and compares what the last of them caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.bundle.manifest import BackboneEntry
from dlp_edge.bundle.weight_file import Weights
from dlp_edge.errors import DeviceError
from dlp_edge.native_calls import native_calls
from dlp_edge.onnx_bytes.protobuf import parts, read_message, text, texts, write_message
from dlp_edge.onnx_bytes.reader import GRAPH, MODEL, NODE, TENSOR, VALUE
from dlp_edge.onnx_bytes.writer import Fields
from dlp_edge.runtime.engine.bound_tensor import BoundTensor
from dlp_edge.runtime.engine.device import Device, open_session

LAYERS = 3  # the last one's cache depends on two whole layers
TOKENS, STEPS = 80, 4  # of the prompt, and after it
RANK = 4
CHUNKS = (512, 24)  # tokens of a pass over a prompt, from the fastest
# Of the root mean square of the values compared. Right kernels reach 1e-5 in single precision,
# a wrong one 0.1 and more.
TOLERANCE = 1e-2

Array = npt.NDArray[np.floating]


def largest_right_chunk(
    graph: bytes, entry: BackboneEntry, device: Device, weights: Weights | None, folder: Path | None
) -> int:
    """The most tokens a pass over a prompt may have on this device.

    Args:
        graph: as the device runs it, without custom operators.

    Raises:
        DeviceError: the device's results are wrong for every size.
    """
    layers = min(LAYERS, entry.num_layers)
    cut, inputs, names = _first_layers(graph, layers)
    if weights is not None:
        weights = {name: weight for name, weight in weights.items() if name in names}
    cpu = replace(device.without_operators(), kind="cpu")
    expected = _cached(open_session(cut, cpu, weights, folder), entry, layers, inputs, "cpu", 512)
    session = open_session(cut, device, weights, folder)
    scale = float(np.sqrt(np.mean(expected**2)))
    for chunk in CHUNKS:
        found = _cached(session, entry, layers, inputs, device.kind, chunk)
        if np.abs(found - expected).max() <= TOLERANCE * scale:  # False for NaN
            return chunk
    raise DeviceError(
        f"{device.kind} computes wrong results on this machine (its self-check)",
        'Update the GPU\'s driver, or use device="cpu"',
    )


def _first_layers(model: bytes, layers: int) -> tuple[bytes, set[str], set[str]]:
    """The part of a graph that writes the caches of its first layers, with its inputs and weights
    by name."""
    message = read_message(memoryview(model), MODEL)
    graph = read_message(parts(message, 7)[0], GRAPH)
    last = [f"present.{layers - 1}.{side}" for side in ("key", "value")]
    wanted, nodes = set(last), list[memoryview]()
    for part in reversed(parts(graph, 1)):
        node = read_message(part, NODE)
        if wanted.intersection(texts(node, 2)):
            wanted.update(texts(node, 1))
            nodes.append(part)
    written = {name for part in nodes for name in texts(read_message(part, NODE), 2)}
    inputs = {n: p for p in parts(graph, 11) if (n := text(read_message(p, VALUE), 1)) in wanted}
    tensors = {n: p for p in parts(graph, 5) if (n := text(read_message(p, TENSOR), 8)) in wanted}
    outputs = [p for p in parts(graph, 12) if text(read_message(p, VALUE), 1) in written]
    changed: Fields = {1: nodes[::-1], 5: list(tensors.values()), 11: list(inputs.values())}
    data = write_message({**message, 7: [write_message({**graph, **changed, 12: outputs})]})
    return data, set(inputs), set(tensors)


def _cached(
    session: ort.InferenceSession,
    entry: BackboneEntry,
    layers: int,
    inputs: set[str],
    kind: str,
    chunk: int,
) -> Array:
    """Keys and values of the last layer after a prompt, in passes of `chunk`, and single steps."""
    ids = np.random.default_rng(0).integers(0, entry.vocab_size, TOKENS + STEPS)
    binding = session.io_binding()
    total = np.zeros((), np.int32)
    value = ort.OrtValue.ortvalue_from_numpy(total)
    binding.bind_ortvalue_input("total_sequence_length", value)
    shape = (1, entry.num_kv_heads, TOKENS + STEPS, entry.head_size)
    caches = {
        f"{layer}.{side}": BoundTensor(np.zeros(shape, entry.dtype), kind)
        for layer in range(layers)
        for side in ("key", "value")
    }
    kept = []
    sizes = {f"{slot.name}.A": slot.input_size for slot in entry.slots}
    sizes |= {f"{slot.name}.B": slot.output_size for slot in entry.slots}
    for name in sizes.keys() & inputs:
        pair = np.random.default_rng(sizes[name]).standard_normal((1, RANK, sizes[name]))
        kept.append(BoundTensor((pair / np.sqrt(sizes[name])).astype(entry.dtype), kind))
        kept[-1].bind_input(binding, name, 0, 1)
    for name, cache in caches.items():
        cache.bind_input(binding, f"past_key_values.{name}", 0, 1)
        cache.bind_output(binding, f"present.{name}", 0, 1)
    for start, stop in _passes(chunk):
        tokens = BoundTensor(ids[None, start:stop], kind)
        length = BoundTensor(np.array([stop - 1], np.int32), kind)
        tokens.bind_input(binding, "input_ids", 0, 1)
        length.bind_input(binding, "seqlens_k", 0, 1)
        total[()] = stop
        with native_calls:
            session.run_with_iobinding(binding)
    last = [caches[f"{layers - 1}.{side}"] for side in ("key", "value")]
    for cache in last:
        cache.download()
    return np.stack([cache.host for cache in last])


def _passes(chunk: int) -> Sequence[tuple[int, int]]:
    """Start and end of each pass: the prompt in chunks, then steps."""
    prompt = [(at, min(at + chunk, TOKENS)) for at in range(0, TOKENS, chunk)]
    return [*prompt, *((at, at + 1) for at in range(TOKENS, TOKENS + STEPS))]
