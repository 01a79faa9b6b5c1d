"""Score draft tokens in one pass, bit for bit as one step per token would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.runtime.engine.backbone import VERIFY_TOKENS, Backbone
from dlp_edge.runtime.engine.bound_tensor import BoundTensor, DeviceTensor
from dlp_edge.runtime.engine.graphs.verify_graph import present_after
from dlp_edge.runtime.engine.interrupt import Interrupt, run_bound

Logits = npt.NDArray[np.floating]


class Verifier:
    """The verify graph, bound to the cache of a decoder's first sequence."""

    def __init__(
        self,
        backbone: Backbone,
        cache: Mapping[str, BoundTensor],
        shared: Mapping[str, BoundTensor],
    ) -> None:
        self._session = backbone.verify_session()
        self._binding = self._session.io_binding()
        self._zeros: dict[str, BoundTensor] = {}
        entry, kind = backbone.entry, backbone.device.kind
        self._kind, self._dtype = kind, np.dtype(entry.dtype)
        self._tokens = BoundTensor(np.zeros((1, VERIFY_TOKENS), np.int64), kind)
        self._past = BoundTensor(np.zeros(1, np.int32), kind)
        self._total = np.zeros((), np.int32)
        self._total_value = ort.OrtValue.ortvalue_from_numpy(self._total)
        self._positions = BoundTensor(np.arange(VERIFY_TOKENS, dtype=np.int64), kind)
        self._logits = BoundTensor(
            np.zeros((1, VERIFY_TOKENS, entry.vocab_size), entry.dtype), kind
        )
        self._tokens.bind_input(self._binding, "input_ids", 0, 1)
        self._past.bind_input(self._binding, "seqlens_k", 0, 1)
        self._binding.bind_ortvalue_input("total_sequence_length", self._total_value)
        self._positions.bind_input(self._binding, "logit_positions", 0, VERIFY_TOKENS)
        self._logits.bind_output(self._binding, "logits", 0, 1)
        for name, tensor in shared.items():
            tensor.bind_input(self._binding, name, 0, tensor.shape[0])
        for name, buffer in cache.items():
            buffer.bind_input(self._binding, f"past_key_values.{name}", 0, 1)
            buffer.bind_output(self._binding, f"present.{name}", 0, 1)
            for token in range(VERIFY_TOKENS - 1):
                buffer.bind_output(self._binding, present_after(f"present.{name}", token), 0, 1)

    def bind_slots(self, slots: Mapping[str, BoundTensor | DeviceTensor]) -> None:
        """Bind the slots of the first sequence.

        An empty slot is bound as zeros of rank 1: onnxruntime's product over rank 0 leaves its
        output unwritten.
        """
        for name, buffer in slots.items():
            if buffer.shape[1]:
                buffer.bind_input(self._binding, name, 0, 1)
                continue
            if name not in self._zeros:
                zeros = np.zeros((1, 1, buffer.shape[2]), self._dtype)
                self._zeros[name] = BoundTensor(zeros, self._kind)
            self._zeros[name].bind_input(self._binding, name, 0, 1)

    def run(self, tokens: Sequence[int], past: int, interrupt: Interrupt | None) -> Logits:
        """Append S <= VERIFY_TOKENS tokens to a cache of `past` tokens.

        The pass always writes VERIFY_TOKENS entries; those after the S tokens are garbage.

        Returns:
            The logits [S, V] after each token.
        """
        self._tokens.host[0, : len(tokens)] = tokens
        self._tokens.upload()
        self._past.host[0] = past  # the index of the first new token
        self._past.upload()
        self._total[()] = past + 1
        run_bound(self._session, self._binding, interrupt)
        self._logits.download()
        logits: Logits = self._logits.host[0, : len(tokens)]
        return logits
