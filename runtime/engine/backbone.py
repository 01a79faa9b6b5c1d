"""The backbone's graph, opened and checked against the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.bundle.manifest import BackboneEntry, Slot
from dlp_edge.bundle.weight_file import Weights
from dlp_edge.errors import BundleError
from dlp_edge.runtime.engine.cuda_graphs import Captures, is_capturing
from dlp_edge.runtime.engine.device import Device, open_session
from dlp_edge.runtime.engine.operator_graph import slot_inputs, with_operators
from dlp_edge.runtime.engine.verify_graph import rowwise

ROWS = 8  # tokens of a rowwise pass


@dataclass(frozen=True)
class Backbone:
    """A loaded graph; several decoders, each with a KV cache of its own, can run it.

    Attributes:
        own_operators: whether it runs on our own operators (`operator_graph.py`).
        captures: the CUDA graphs of its steps; None where it captures none.
        weights: what the session reads where it is, and would not keep.
        rowwise: the same graph for ROWS tokens at once (`rowwise.py`); the first call loads it.
    """

    session: ort.InferenceSession
    entry: BackboneEntry
    device: Device
    own_operators: bool
    captures: Captures | None
    weights: Weights
    rowwise: Callable[[], ort.InferenceSession]


def open_backbone(
    path: Path,
    entry: BackboneEntry,
    device: Device,
    model: bytes | None = None,
    weights: Weights | None = None,
    reread: Callable[[], Weights] = dict,
) -> Backbone:
    """Loads a graph onto the device; see `open_session`.

    Args:
        path: its file, with the weights beside it.
        model, weights: what these files hold, where it was read already.
        reread: gives the weights once more, where the rowwise graph is asked for.

    Raises:
        BundleError: onnxruntime cannot read it, or it is not as the manifest says.
        DeviceError: onnxruntime fell back to another provider.
        MemoryError: there is no room for it.
    """
    graph = path.read_bytes() if model is None else model
    # Linear reads weights where they are; onnxruntime's own operators make them anew. Bundles for
    # CUDA, which are fp16, have other nodes.
    quantised = entry.quantisation in ("int4", "int8") and entry.dtype == "float32"
    own = device.operators is not None and quantised
    if own:
        graph, weights = _rewrite(graph, entry, weights)
    folder = path.parent if own or weights is None else None
    session = open_session(graph, device, weights, folder, device.captures)
    _check_inputs(session, entry, own)
    kept = weights if own and weights else {}
    read_by_onnxruntime = weights is None

    @cache
    def by_rows() -> ort.InferenceSession:
        again = None if read_by_onnxruntime else kept or reread()
        return open_session(rowwise(graph, ROWS), device, again, folder)

    captures = Captures() if is_capturing(session) else None
    return Backbone(session, entry, device, own, captures, kept, by_rows)


def _rewrite(
    graph: bytes, entry: BackboneEntry, weights: Weights | None
) -> tuple[bytes, Weights | None]:
    """The graph on our own operators, and the weights that it still has."""
    halves: Weights = {}

    def halve(name: str) -> bool:
        half = None if weights is None or name not in weights else _in_half(weights[name])
        if half is not None:
            halves[name] = half
        return half is not None

    try:
        graph, found = with_operators(graph, entry.slots, halve)
    except (ValueError, LookupError) as error:
        raise BundleError(
            f"the backbone's graph is not as an export writes it ({error})",
            "Export the bundle again",
        ) from error
    if weights is not None:
        weights = {
            name: (halves if weight.half else weights)[weight.source].reshape(weight.shape)
            for name, weight in found.items()
            if weight.source in weights
        }
    return graph, weights


def _in_half(scales: npt.NDArray[Any]) -> npt.NDArray[np.float16] | None:
    """Scales in half precision, if each changes by at most 2^-11 of itself or of the average one.
    That is so where none overflows and the average is a normal number: subnormal ones are 2^-24
    apart."""
    sizes, half = np.abs(scales), np.finfo(np.float16)
    fits = sizes.max(initial=0) <= half.max and sizes.mean() >= half.smallest_normal
    return scales.astype(np.float16) if fits else None


def _check_inputs(session: ort.InferenceSession, entry: BackboneEntry, own: bool) -> None:
    """Raises BundleError unless the graph has the inputs and shapes that the manifest promises."""
    inputs = {value.name: value for value in session.get_inputs()}
    expected = {"input_ids", "seqlens_k", "total_sequence_length", "logit_positions"}
    expected |= slot_inputs(entry.slots) if own else _pairs(entry.slots)
    for layer in range(entry.num_layers):
        for kind in ("key", "value"):
            name = f"past_key_values.{layer}.{kind}"
            expected.add(name)
            if name in inputs and inputs[name].shape[1] != entry.num_kv_heads:
                raise _not_as_promised(name)
    for name in expected ^ inputs.keys():
        raise _not_as_promised(name)
    for slot in entry.slots if not own else ():
        sizes = (inputs[f"{slot.name}.A"].shape[2], inputs[f"{slot.name}.B"].shape[2])
        if sizes != (slot.input_size, slot.output_size):
            raise _not_as_promised(slot.name)
    if session.get_outputs()[0].shape[2] != entry.vocab_size:
        raise _not_as_promised("logits")


def _pairs(slots: Sequence[Slot]) -> set[str]:
    return {f"{slot.name}.{side}" for slot in slots for side in "AB"}


def _not_as_promised(name: str) -> BundleError:
    return BundleError(
        f"the backbone's graph is not as the manifest says, at {name}", "Export the bundle again"
    )
