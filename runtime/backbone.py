"""The backbone's graph, opened and checked against the manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnxruntime as ort

from dlp_edge.errors import BundleError
from dlp_edge.manifest import BackboneEntry
from dlp_edge.runtime.device import Device, open_session
from dlp_edge.runtime.rowwise import rowwise
from dlp_edge.weights import Weights

ROWS = 8  # tokens of a rowwise pass


@dataclass(frozen=True)
class Backbone:
    """A loaded graph; several decoders, each with a KV cache of its own, can run it.

    Attributes:
        rowwise: the same graph for ROWS tokens at once (`rowwise.py`); the first call loads it,
            with the weights.
    """

    session: ort.InferenceSession
    entry: BackboneEntry
    device: Device
    rowwise: Callable[[], ort.InferenceSession]


def open_backbone(
    model: Path | bytes,
    entry: BackboneEntry,
    device: Device,
    weights: Weights | None = None,
    reread: Callable[[], Weights] = dict,
) -> Backbone:
    """Loads the graph onto the device; see `open_session`.

    Args:
        reread: gives the weights once more, where the rowwise graph is asked for.

    Raises:
        BundleError: onnxruntime cannot read it, or it is not as the manifest says.
        DeviceError: onnxruntime fell back to another provider.
        MemoryError: there is no room for it.
    """
    session = open_session(model, device, weights)
    _check_inputs(session, entry)

    @cache
    def by_rows() -> ort.InferenceSession:
        data = model if isinstance(model, bytes) else model.read_bytes()
        return open_session(rowwise(data, ROWS), device, reread())

    return Backbone(session, entry, device, by_rows)


def _check_inputs(session: ort.InferenceSession, entry: BackboneEntry) -> None:
    """Raises BundleError unless the graph has the inputs and shapes that the manifest promises."""
    inputs = {value.name: value for value in session.get_inputs()}
    expected = {"input_ids", "seqlens_k", "total_sequence_length", "logit_positions"}
    expected |= {f"{slot.name}.{side}" for slot in entry.slots for side in "AB"}
    for layer in range(entry.num_layers):
        for kind in ("key", "value"):
            name = f"past_key_values.{layer}.{kind}"
            expected.add(name)
            if name in inputs and inputs[name].shape[1] != entry.num_kv_heads:
                raise _not_as_promised(name)
    for name in expected ^ inputs.keys():
        raise _not_as_promised(name)
    for slot in entry.slots:
        sizes = (inputs[f"{slot.name}.A"].shape[2], inputs[f"{slot.name}.B"].shape[2])
        if sizes != (slot.input_size, slot.output_size):
            raise _not_as_promised(slot.name)
    if session.get_outputs()[0].shape[2] != entry.vocab_size:
        raise _not_as_promised("logits")


def _not_as_promised(name: str) -> BundleError:
    return BundleError(
        f"the backbone's graph is not as the manifest says, at {name}", "Export the bundle again"
    )
