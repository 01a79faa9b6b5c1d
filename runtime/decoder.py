"""Prefill and decode over token ids: the backbone's graph, its KV cache and its adapter slots.

Knows no text. Everything that keeps its shape from token to token is bound once
(onnxruntime's I/O binding); past and present of the cache are one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.errors import BundleError, ResourceError, UsageError
from dlp_edge.manifest import BackboneEntry
from dlp_edge.runtime.device import Device, first_line, open_session
from dlp_edge.runtime.fusion import SlotPair

Logits = npt.NDArray[np.floating]
PREFILL_CHUNK = 512


class Cancelled(Exception):  # noqa: N818 - a signal, not an error
    """Prefill stopped between two chunks because it was asked to."""


class Decoder:
    """One sequence on the backbone.

    Attributes:
        length: tokens in the KV cache.
        max_context: room of the KV cache in tokens.
    """

    def __init__(
        self, path: Path, backbone: BackboneEntry, device: Device, max_context: int
    ) -> None:
        self.length = 0
        self.max_context = max_context
        self._vocab_size = backbone.vocab_size
        self._dtype = np.dtype(backbone.dtype)
        self._session = open_session(path, device)
        _check_inputs(self._session, backbone)
        self._kind = device.kind
        self._binding = self._session.io_binding()
        self._cache = self._bind_cache(backbone)
        # These four are read by onnxruntime where they lie; steps write into them in place.
        self._token = np.zeros((1, 1), np.int64)
        self._seqlens = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._position = np.zeros(1, np.int64)
        self._logits: Logits = np.zeros((1, 1, self._vocab_size), self._dtype)
        self._token_value = _on_cpu(self._token)
        self._logits_value = _on_cpu(self._logits)
        self._lengths = (_on_cpu(self._seqlens), _on_cpu(self._total))
        self._position_value = _on_cpu(self._position)
        self._slot_values: dict[str, ort.OrtValue] = {}
        self._binding.bind_ortvalue_input("seqlens_k", self._lengths[0])
        self._binding.bind_ortvalue_input("total_sequence_length", self._lengths[1])
        self._bind_step()

    def set_fusion(self, pairs: Mapping[str, SlotPair]) -> None:
        """Binds the low-rank pairs of all slots; they are in force from the next pass on."""
        for name, pair in pairs.items():
            for key, tensor in ((f"{name}.A", pair.a), (f"{name}.B", pair.b)):
                value = ort.OrtValue.ortvalue_from_numpy(tensor, self._kind, 0)
                self._binding.bind_ortvalue_input(key, value)
                self._slot_values[key] = value  # the binding holds no reference

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens of the cache."""
        self.length = min(self.length, length)

    def step(self, token: int) -> Logits:
        """Appends one token; returns the logits [V] after it (valid until the next pass)."""
        self._token[0, 0] = token
        self._run(1)
        return self._last()

    def prefill(
        self, ids: Sequence[int], should_stop: Callable[[], bool] = lambda: False
    ) -> Logits:
        """Appends tokens; returns the logits [V] after the last one.

        Raises:
            UsageError: there are no tokens.
            Cancelled: `should_stop` said so between two chunks; the cache keeps whole chunks.
        """
        if not ids:
            raise UsageError("there are no tokens to prefill", "Give at least one")
        for start in range(0, len(ids), PREFILL_CHUNK):
            if should_stop():
                raise Cancelled
            chunk = np.asarray(ids[start : start + PREFILL_CHUNK], np.int64)[None]
            self._position[0] = chunk.shape[1] - 1
            self._binding.bind_ortvalue_input("input_ids", _on_cpu(chunk))
            try:
                self._run(chunk.shape[1])
            finally:
                self._bind_step()
        return self._last()

    def all_logits(self, ids: Sequence[int]) -> Logits:
        """Appends tokens; returns the logits [S, V] after each of them (for measuring)."""
        chunk = np.asarray(ids, np.int64)[None]
        positions = np.arange(chunk.shape[1], dtype=np.int64)
        logits: Logits = np.zeros((1, chunk.shape[1], self._vocab_size), self._dtype)
        self._binding.bind_ortvalue_input("input_ids", _on_cpu(chunk))
        self._binding.bind_ortvalue_input("logit_positions", _on_cpu(positions))
        self._binding.bind_ortvalue_output("logits", _on_cpu(logits))
        try:
            self._run(chunk.shape[1])
        finally:
            self._bind_step()
        return logits.reshape(logits.shape[1:])

    def _last(self) -> Logits:
        return self._logits.reshape(self._vocab_size)

    def _run(self, count: int) -> None:
        total = self.length + count
        if total > self.max_context:
            raise ResourceError(
                f"the cache holds {self.max_context} tokens, {total} are needed",
                "Load the bundle with a larger max_context",
            )
        self._seqlens[0] = total - 1  # GroupQueryAttention wants the last valid index
        self._total[()] = total
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            if "allocate" in str(error).lower():
                raise ResourceError(
                    "memory ran out inside the backbone", "Use a shorter prompt"
                ) from error
            raise BundleError(
                f"the backbone's graph does not run ({first_line(error)})",
                "Export the bundle again",
            ) from error
        self.length = total

    def _bind_step(self) -> None:
        """Binds what a one-token pass reads and writes."""
        self._position[0] = 0
        self._binding.bind_ortvalue_input("input_ids", self._token_value)
        self._binding.bind_ortvalue_input("logit_positions", self._position_value)
        self._binding.bind_ortvalue_output("logits", self._logits_value)

    def _bind_cache(self, backbone: BackboneEntry) -> list[ort.OrtValue]:
        """One buffer [1, kv heads, max_context, head size] per layer for keys, one for values."""
        shape = (1, backbone.num_kv_heads, self.max_context, backbone.head_size)
        values: list[ort.OrtValue] = []
        for layer in range(backbone.num_layers):
            for kind in ("key", "value"):
                # Zeros are committed by the operating system only where they are written.
                value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._dtype), self._kind)
                self._binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", value)
                self._binding.bind_ortvalue_output(f"present.{layer}.{kind}", value)
                values.append(value)
        return values


def _check_inputs(session: ort.InferenceSession, backbone: BackboneEntry) -> None:
    """Raises BundleError unless the graph has the inputs and shapes that the manifest promises."""
    inputs = {value.name: value for value in session.get_inputs()}
    expected = {"input_ids", "seqlens_k", "total_sequence_length", "logit_positions"}
    expected |= {f"{slot.name}.{side}" for slot in backbone.slots for side in "AB"}
    for layer in range(backbone.num_layers):
        for kind in ("key", "value"):
            name = f"past_key_values.{layer}.{kind}"
            expected.add(name)
            if name in inputs and inputs[name].shape[1] != backbone.num_kv_heads:
                raise _not_as_promised(name)
    for name in expected ^ inputs.keys():
        raise _not_as_promised(name)
    for slot in backbone.slots:
        sizes = (inputs[f"{slot.name}.A"].shape[2], inputs[f"{slot.name}.B"].shape[2])
        if sizes != (slot.input_size, slot.output_size):
            raise _not_as_promised(slot.name)
    if session.get_outputs()[0].shape[2] != backbone.vocab_size:
        raise _not_as_promised("logits")


def _not_as_promised(name: str) -> BundleError:
    return BundleError(
        f"the backbone's graph is not as the manifest says, at {name}", "Export the bundle again"
    )


def _on_cpu(array: npt.NDArray[np.generic]) -> ort.OrtValue:
    """An OrtValue over the array's own memory."""
    return ort.OrtValue.ortvalue_from_numpy(array)
