"""Several tokens in one pass, each as a step of its own would read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.runtime.engine.backbone import VERIFY_TOKENS, Backbone
from dlp_edge.runtime.engine.bound_tensor import BoundTensor, DeviceTensor
from dlp_edge.runtime.engine.interrupt import Interrupt, run_bound
from dlp_edge.runtime.engine.verify_graph import present_after

Logits = npt.NDArray[np.floating]


class Verifier:
    """The verify graph, bound to the first sequence of a cache."""

    def __init__(
        self,
        backbone: Backbone,
        cache: Mapping[str, BoundTensor],
        adapters: Mapping[str, BoundTensor],
    ) -> None:
        self._session = backbone.verify_session()
        self._binding = self._session.io_binding()
        self._zeros: dict[str, BoundTensor] = {}
        entry, kind = backbone.entry, backbone.device.kind
        self._kind, self._dtype = kind, np.dtype(entry.dtype)
        self._tokens = BoundTensor(np.zeros((1, VERIFY_TOKENS), np.int64), kind)
        self._before = BoundTensor(np.zeros(1, np.int32), kind)
        self._total = np.zeros((), np.int32)
        self._total_value = ort.OrtValue.ortvalue_from_numpy(self._total)
        self._positions = BoundTensor(np.arange(VERIFY_TOKENS, dtype=np.int64), kind)
        self._logits = BoundTensor(
            np.zeros((1, VERIFY_TOKENS, entry.vocab_size), entry.dtype), kind
        )
        self._tokens.bind_input(self._binding, "input_ids", 0, 1)
        self._before.bind_input(self._binding, "seqlens_k", 0, 1)
        self._binding.bind_ortvalue_input("total_sequence_length", self._total_value)
        self._positions.bind_input(self._binding, "logit_positions", 0, VERIFY_TOKENS)
        self._logits.bind_output(self._binding, "logits", 0, 1)
        for name, stacked in adapters.items():
            stacked.bind_input(self._binding, name, 0, stacked.shape[0])
        for name, buffer in cache.items():
            buffer.bind_input(self._binding, f"past_key_values.{name}", 0, 1)
            buffer.bind_output(self._binding, f"present.{name}", 0, 1)
            for row in range(VERIFY_TOKENS - 1):
                buffer.bind_output(self._binding, present_after(f"present.{name}", row), 0, 1)

    def bind_slots(self, slots: Mapping[str, BoundTensor | DeviceTensor]) -> None:
        """Binds the slots of the first sequence; empty ones as rank 1 of zeros, because a product
        over nothing leaves its output as it was."""
        for name, buffer in slots.items():
            if buffer.shape[1]:
                buffer.bind_input(self._binding, name, 0, 1)
                continue
            if name not in self._zeros:
                zeros = np.zeros((1, 1, buffer.shape[2]), self._dtype)
                self._zeros[name] = BoundTensor(zeros, self._kind)
            self._zeros[name].bind_input(self._binding, name, 0, 1)

    def run(self, tokens: Sequence[int], before: int, interrupt: Interrupt | None) -> Logits:
        """The logits [S, V] after each of the tokens, before which the cache has `before`. What
        it has behind them afterwards is of no use."""
        self._tokens.host[0, : len(tokens)] = tokens
        self._tokens.upload()
        self._before.host[0] = before  # the last valid index, with the first token
        self._before.upload()
        self._total[()] = before + 1
        run_bound(self._session, self._binding, interrupt)
        self._logits.download()
        logits: Logits = self._logits.host[0, : len(tokens)]
        return logits
