"""Prefill and decode over token ids: the backbone's graph, a KV cache and the adapter slots.

Knows no text. Everything that keeps its shape from token to token is bound once
(onnxruntime's I/O binding); past and present of the cache are one buffer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.errors import ResourceError, UsageError
from dlp_edge.runtime.engine.backbone import VERIFY_TOKENS, Backbone
from dlp_edge.runtime.engine.bound_tensor import BoundTensor, DeviceTensor
from dlp_edge.runtime.engine.cuda_graphs import NOT_CAPTURED
from dlp_edge.runtime.engine.interrupt import Interrupt, run_bound
from dlp_edge.runtime.engine.ort_errors import engine_errors
from dlp_edge.runtime.engine.verifier import Verifier

Logits = npt.NDArray[np.floating]
PREFILL_CHUNK = 512


class Decoder:
    """Up to G sequences on the backbone, each with its own length, cache and fusion.

    Prompts are prefilled one sequence at a time; a step appends a token to each of the first
    sequences in one pass, where their adapters are the batched GEMM of eq. 6.

    Attributes:
        lengths: tokens in the cache of each sequence.
        labels: a name for the fusion that each sequence is under; `reuse` goes by it.
        max_context: room of each sequence's cache in tokens.
    """

    def __init__(self, backbone: Backbone, max_context: int, sequences: int = 1) -> None:
        entry = backbone.entry
        self.lengths = np.zeros(sequences, np.int32)
        self.labels: list[Hashable] = [None] * sequences
        self.max_context = max_context
        self._vocab_size = entry.vocab_size
        self._dtype = np.dtype(entry.dtype)
        self._backbone = backbone
        self._session = backbone.session
        self._kind = backbone.device.kind
        self._binding = backbone.session.io_binding()
        self._bound: tuple[int, int] | None = None  # first and number of the sequences bound
        self._places: Hashable = None  # of all that is bound; None: not known yet
        self._cache = self._make_cache(entry.num_layers, entry.num_kv_heads, entry.head_size)
        self._adapters: dict[str, BoundTensor] = {}
        self._slots: dict[str, BoundTensor | DeviceTensor] = {}
        # What each cache was made of: its tokens, each with the label that it was read under.
        self._written: list[list[tuple[int, Hashable]]] = [[] for _ in range(sequences)]
        self._tokens = BoundTensor(np.zeros((sequences, 1), np.int64), self._kind)
        self._seqlens = BoundTensor(np.zeros(sequences, np.int32), self._kind)
        self._logits = BoundTensor(
            np.zeros((sequences, 1, self._vocab_size), self._dtype), self._kind
        )
        self._position = BoundTensor(np.zeros(1, np.int64), self._kind)
        self._total = np.zeros((), np.int32)  # attention wants it in the host's memory
        self._total_value = ort.OrtValue.ortvalue_from_numpy(self._total)
        self._binding.bind_ortvalue_input("total_sequence_length", self._total_value)
        self._position.bind_input(self._binding, "logit_positions", 0, 1)
        self._verifier: Verifier | None = None

    @property
    def cache_bytes(self) -> int:
        """Size of the caches of all sequences, filled or not."""
        return sum(buffer.host.nbytes for buffer in self._cache.values())

    def set_shared_inputs(self, adapters: Mapping[str, npt.NDArray[Any]]) -> None:
        """Binds what is the same for all fusions and sequences, by the names of the inputs."""
        self._adapters = {
            name: BoundTensor(stacked, self._kind) for name, stacked in adapters.items()
        }
        for name, stacked in self._adapters.items():
            stacked.bind_input(self._binding, name, 0, stacked.shape[0])

    def set_fusion(self, tensors: Mapping[str, npt.NDArray[Any] | DeviceTensor]) -> None:
        """Binds what a fuser gives, by the names of the inputs [G, ...]; it is in force from the
        next pass on."""
        with engine_errors(self._kind):
            for name, tensor in tensors.items():
                self._fill(name, tensor)

    def _fill(self, name: str, tensor: npt.NDArray[Any] | DeviceTensor) -> None:
        known = self._slots.get(name)
        if known is not None and known.is_backed_by(tensor):
            known.upload()  # where it lies is bound already
            return
        self._places = None
        self._slots[name] = (
            tensor if isinstance(tensor, DeviceTensor) else BoundTensor(tensor, self._kind)
        )
        if self._bound is not None:
            self._slots[name].bind_input(self._binding, name, *self._bound)

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Forgets all but the first `length` tokens of a sequence's cache."""
        del self._written[sequence][length:]
        self.lengths[sequence] = len(self._written[sequence])

    def reuse(self, ids: Sequence[int], sequence: int = 0) -> int:
        """Keeps of a sequence's cache what a prefill of `ids` under the present fusion would
        write again, and forgets the rest; returns how many tokens that is."""
        written, label = self._written[sequence], self.labels[sequence]
        same = 0
        for token, (known, under) in zip(ids, written, strict=False):
            if token != known or under != label:
                break
            same += 1
        self.truncate(same, sequence)
        return same

    def move(self, source: int, target: int) -> None:
        """Copies one sequence's cache over another's; the fusions stay with the caller."""
        for buffer in self._cache.values():
            buffer.copy_tokens(buffer, source, target, int(self.lengths[source]))
        self._take_over(self, source, target)

    def copy_cache(self, other: Decoder) -> None:
        """Takes over the cache of another decoder's first sequence."""
        for name, buffer in self._cache.items():
            buffer.copy_tokens(other._cache[name], 0, 0, int(other.lengths[0]))
        self._take_over(other, 0, 0)

    def _take_over(self, other: Decoder, source: int, target: int) -> None:
        self.lengths[target] = other.lengths[source]
        self._written[target] = list(other._written[source])
        self.labels[target] = other.labels[source]

    def step(self, tokens: Sequence[int], interrupt: Interrupt | None = None) -> Logits:
        """Appends tokens[i] to sequence i; returns the logits [G, V] after them (valid until the
        next pass).

        Raises:
            Cancelled: the interrupt was set; the cache is as before.
        """
        self._tokens.host[: len(tokens), 0] = tokens
        self._tokens.upload()
        self._run(0, len(tokens), 1, interrupt=interrupt)
        for sequence, token in enumerate(tokens):
            self._note(sequence, [token])
        logits: Logits = self._logits.host[: len(tokens), 0]
        return logits

    def prefill(
        self, ids: Sequence[int], sequence: int = 0, interrupt: Interrupt | None = None
    ) -> Logits:
        """Appends tokens to one sequence; returns the logits [V] after the last one.

        Raises:
            UsageError: there are no tokens.
            Cancelled: the interrupt was set; the cache keeps whole chunks.
        """
        if not ids:
            raise UsageError("there are no tokens to prefill", "Give at least one")
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = np.asarray(ids[start : start + PREFILL_CHUNK], np.int64)[None]
            self._run(sequence, 1, chunk.shape[1], chunk, interrupt)
            self._note(sequence, chunk[0].tolist())
        last: Logits = self._logits.host[sequence, 0]
        return last

    def all_logits(self, ids: Sequence[int]) -> Logits:
        """Appends tokens to the first sequence; returns the logits [S, V] after each of them
        (for measuring)."""
        chunk = np.asarray(ids, np.int64)[None]
        logits = BoundTensor(
            np.zeros((1, chunk.shape[1], self._vocab_size), self._dtype), self._kind
        )
        positions = BoundTensor(np.arange(chunk.shape[1], dtype=np.int64), self._kind)
        self._bind(0, 1)
        positions.bind_input(self._binding, "logit_positions", 0, chunk.shape[1])
        logits.bind_output(self._binding, "logits", 0, 1)
        try:
            self._run(0, 1, chunk.shape[1], chunk)
            self._note(0, ids)
        finally:
            self._bound = None
            self._position.bind_input(self._binding, "logit_positions", 0, 1)
        logits.download()
        found: Logits = logits.host[0]
        return found

    def verify(self, tokens: Sequence[int], interrupt: Interrupt | None = None) -> Logits:
        """Appends at most VERIFY_TOKENS tokens to the first sequence in one pass.

        Logits and cache equal those of S steps bit for bit. The first call loads the weights a
        second time.

        Returns:
            The logits [S, V] after each token, valid until the next call.

        Raises:
            ResourceError: the cache has no room for VERIFY_TOKENS tokens.
            Cancelled: the interrupt was set; the cache is as before.
        """
        if interrupt is not None:
            interrupt.check()
        self._check_room(int(self.lengths[0]) + VERIFY_TOKENS)
        if self._verifier is None:
            self._verifier = Verifier(self._backbone, self._cache, self._adapters)
        with engine_errors(self._kind):
            self._verifier.bind_slots(self._slots)
            logits = self._verifier.run(tokens, int(self.lengths[0]), interrupt)
        self.lengths[0] += len(tokens)
        self._note(0, tokens)
        return logits

    def _note(self, sequence: int, ids: Sequence[int]) -> None:
        self._written[sequence] += [(token, self.labels[sequence]) for token in ids]

    def _run(
        self,
        first: int,
        count: int,
        added: int,
        chunk: npt.NDArray[np.int64] | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        """One pass over `count` sequences from `first`, each longer by `added` tokens: a chunk of
        one prompt, or what lies in the token buffer."""
        if interrupt is not None:
            interrupt.check()
        totals = self.lengths[first : first + count] + added
        longest = int(totals.max())
        self._check_room(longest)
        with engine_errors(self._kind):
            self._bind(first, count)
            self._seqlens.host[first : first + count] = totals - 1  # the last valid index
            self._seqlens.upload()
            capture = self._capture(first, count, chunk is not None)
            # A captured step is launched with the total that it was captured with.
            self._total[()] = self.max_context if capture not in (None, NOT_CAPTURED) else longest
            self._position.host[0] = added - 1
            self._position.upload()
            if chunk is not None:
                prompt = BoundTensor(
                    chunk, self._kind
                )  # a name, because a binding holds no reference
                prompt.bind_input(self._binding, "input_ids", 0, 1)
            try:
                run_bound(self._session, self._binding, interrupt, capture)
                self._logits.download()
            finally:
                if chunk is not None:
                    self._tokens.bind_input(self._binding, "input_ids", first, count)
        self.lengths[first : first + count] = totals

    def _capture(self, first: int, count: int, is_prompt: bool) -> int | None:
        """The number of the pass's CUDA graph; None if the session captures none."""
        cuda_graphs = self._backbone.cuda_graphs
        if cuda_graphs is None:
            return None
        if is_prompt:
            return NOT_CAPTURED
        if self._places is None:
            changing = [*self._cache.values(), *self._slots.values()]
            fixed = [self._tokens, self._seqlens, self._logits]
            self._places = (
                self._position.place(0, 1),
                *(rows.place(first, count) for rows in (*fixed, *changing)),
            )
        return cuda_graphs.graph_id(self._places)

    def _check_room(self, tokens: int) -> None:
        if tokens > self.max_context:
            raise ResourceError(
                f"the cache holds {self.max_context} tokens, {tokens} are needed",
                "Load the bundle with a larger max_context",
            )

    def _bind(self, first: int, count: int) -> None:
        """Binds all that belongs to these sequences, unless it is bound already."""
        if self._bound == (first, count):
            return
        # Until all of it is: a failure in between is not to be built upon.
        self._bound = self._places = None
        self._tokens.bind_input(self._binding, "input_ids", first, count)
        self._seqlens.bind_input(self._binding, "seqlens_k", first, count)
        self._logits.bind_output(self._binding, "logits", first, count)
        for name, buffer in self._cache.items():
            buffer.bind_input(self._binding, f"past_key_values.{name}", first, count)
            buffer.bind_output(self._binding, f"present.{name}", first, count)
        for name, slot in self._slots.items():
            slot.bind_input(self._binding, name, first, count)
        self._bound = (first, count)

    def _make_cache(self, layers: int, heads: int, head_size: int) -> dict[str, BoundTensor]:
        """For each layer one buffer [G, kv heads, max_context, head size] for keys, one for
        values."""
        shape = (len(self.lengths), heads, self.max_context, head_size)
        try:
            # Zeros are committed by the operating system only where they are written.
            return {
                f"{layer}.{kind}": BoundTensor(np.zeros(shape, self._dtype), self._kind)
                for layer in range(layers)
                for kind in ("key", "value")
            }
        except MemoryError as error:
            raise ResourceError(
                f"there is not enough memory for a cache of {self.max_context} tokens",
                "Load the bundle with a smaller max_context, or close other sessions",
            ) from error
