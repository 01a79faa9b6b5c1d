"""Load the backbone's graph and check it against the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import onnxruntime as ort

from dlp_edge.bundle.manifest import BackboneEntry, Slot
from dlp_edge.bundle.weight_file import Weights, in_half
from dlp_edge.errors import BundleError
from dlp_edge.runtime.engine.cuda_graphs import CudaGraphs, uses_cuda_graphs
from dlp_edge.runtime.engine.device import Device, open_session
from dlp_edge.runtime.engine.graphs.half_graph import half_graph, half_weights
from dlp_edge.runtime.engine.graphs.operator_graph import slot_inputs, with_operators
from dlp_edge.runtime.engine.graphs.verify_graph import make_verify_graph
from dlp_edge.runtime.engine.graphs.webgpu_graph import for_webgpu
from dlp_edge.runtime.engine.operators import is_quantised
from dlp_edge.runtime.engine.self_check import largest_right_chunk

# MatMulBnb4 copies a table from its stack at each run, which a replayed graph would read again.
NOT_CAPTURED_FORMATS = ("nf4",)
PREFILL_CHUNK = 512  # tokens of a pass over a prompt
VERIFY_TOKENS = 8  # of one verify pass: the last token and up to 7 drafted ones


@dataclass(frozen=True)
class Backbone:
    """A loaded graph. Several decoders, each with its own KV cache, can share it.

    Attributes:
        custom_operators: whether it runs on the custom operators (`operator_graph.py`).
        cuda_graphs: graph ids of its decode steps; None if the session captures none.
        weights: arrays that the session reads in place; held here to keep them alive.
        verify_session: opens the graph of a verify pass (`verify_graph.py`) on the first call.
        prefill_chunk: tokens of a pass over a prompt.
    """

    session: ort.InferenceSession
    entry: BackboneEntry
    device: Device
    custom_operators: bool
    cuda_graphs: CudaGraphs | None
    weights: Weights
    verify_session: Callable[[], ort.InferenceSession]
    prefill_chunk: int = PREFILL_CHUNK


def open_backbone(
    path: Path,
    entry: BackboneEntry,
    device: Device,
    model: bytes | None = None,
    weights: Weights | None = None,
    reread: Callable[[], Weights] = dict,
) -> Backbone:
    """Load a graph onto the device; see `open_session`.

    Args:
        path: the graph's file; its external data lies beside it.
        model, weights: the contents of these files, if already read.
        reread: reads the weights again, for the verify graph, or where CUDA needs them in fp16.

    Raises:
        BundleError: onnxruntime cannot load the graph, or it contradicts the manifest.
        DeviceError: onnxruntime fell back to another provider, or the device fails its self-check.
        MemoryError, DeviceMemoryError: not enough memory.
    """
    graph = path.read_bytes() if model is None else model
    if device.kind == "cuda" and entry.dtype == "float32":  # exported for several targets
        graph, entry, read_single = half_graph(graph), replace(entry, dtype="float16"), reread
        weights = half_weights(read_single() if weights is None else weights)
        reread = lambda: half_weights(read_single())  # noqa: E731
    # Linear reads weights in place; onnxruntime's operators repack them.
    custom = device.operators is not None and is_quantised(entry)
    if custom:
        graph, weights = _rewrite(graph, entry, weights)
    elif not is_quantised(entry):
        device = device.without_operators()
    folder = path.parent if custom or weights is None else None
    capture = device.cuda_graphs and entry.quantisation not in NOT_CAPTURED_FORMATS

    prefill_chunk = PREFILL_CHUNK
    if device.kind == "webgpu":
        graph = for_webgpu(graph)
        prefill_chunk = largest_right_chunk(graph, entry, device, weights, folder)
    session = open_session(graph, device, weights, folder, capture)
    _check_inputs(session, entry, custom)
    in_place = weights if custom and weights else {}
    onnxruntime_reads_files = weights is None

    @cache
    def open_verify_session() -> ort.InferenceSession:
        again = None if onnxruntime_reads_files else in_place or reread()
        return open_session(make_verify_graph(graph, VERIFY_TOKENS), device, again, folder)

    cuda_graphs = CudaGraphs() if uses_cuda_graphs(session) else None
    return Backbone(
        session,
        entry,
        device,
        custom,
        cuda_graphs,
        in_place,
        open_verify_session,
        prefill_chunk,
    )


def _rewrite(
    graph: bytes, entry: BackboneEntry, weights: Weights | None
) -> tuple[bytes, Weights | None]:
    """Rewrite the graph for the custom operators; also returns the weights it still reads."""
    halves: Weights = {}

    def halve(name: str) -> bool:
        half = None if weights is None or name not in weights else in_half(weights[name])
        if half is not None:
            halves[name] = half
        return half is not None

    try:
        graph, rewritten = with_operators(graph, entry.slots, halve)
    except (ValueError, LookupError) as error:
        raise BundleError(
            f"the backbone's graph was not written by an export ({error})",
            "Export the bundle again",
        ) from error
    if weights is not None:
        weights = {
            name: (halves if weight.half else weights)[weight.source].reshape(weight.shape)
            for name, weight in rewritten.items()
            if weight.source in weights
        }
    return graph, weights


def _check_inputs(session: ort.InferenceSession, entry: BackboneEntry, custom: bool) -> None:
    """Raise BundleError unless the graph has the inputs and shapes that the manifest states."""
    inputs = {value.name: value for value in session.get_inputs()}
    expected = {"input_ids", "seqlens_k", "total_sequence_length", "logit_positions"}
    expected |= slot_inputs(entry.slots) if custom else _pair_inputs(entry.slots)
    for layer in range(entry.num_layers):
        for kind in ("key", "value"):
            name = f"past_key_values.{layer}.{kind}"
            expected.add(name)
            if name in inputs and inputs[name].shape[1] != entry.num_kv_heads:
                raise _mismatch(name)
    for name in expected ^ inputs.keys():
        raise _mismatch(name)
    for slot in entry.slots if not custom else ():
        sizes = (inputs[f"{slot.name}.A"].shape[2], inputs[f"{slot.name}.B"].shape[2])
        if sizes != (slot.input_size, slot.output_size):
            raise _mismatch(slot.name)
    if session.get_outputs()[0].shape[2] != entry.vocab_size:
        raise _mismatch("logits")


def _pair_inputs(slots: Sequence[Slot]) -> set[str]:
    return {f"{slot.name}.{side}" for slot in slots for side in "AB"}


def _mismatch(name: str) -> BundleError:
    return BundleError(
        f"the backbone's graph contradicts the manifest at {name}", "Export the bundle again"
    )
