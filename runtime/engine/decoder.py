"""Prefill and decode token ids with the backbone's graph, a KV cache and the adapter slots.

Tensors that keep their shape between steps are bound once (onnxruntime I/O binding). The cache's
past and present share one buffer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import takewhile
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.errors import ResourceError, UsageError
from dlp_edge.runtime.engine.backbone import VERIFY_TOKENS, Backbone
from dlp_edge.runtime.engine.bound_tensor import BoundTensor, DeviceTensor, sequence_tensor
from dlp_edge.runtime.engine.cuda_graphs import NOT_CAPTURED
from dlp_edge.runtime.engine.interrupt import Interrupt, run_bound
from dlp_edge.runtime.engine.kv_cache import make_cache
from dlp_edge.runtime.engine.ort_errors import engine_errors
from dlp_edge.runtime.engine.verifier import Verifier

Logits = npt.NDArray[np.floating]
Values = npt.NDArray[np.generic]  # keys or values of some tokens [buffers, heads, tokens, size]


class Decoder:
    """Up to G sequences on the backbone, each with its own length, cache and fusion.

    A step appends one token to each of the first sequences in one pass; their adapters form the
    batched GEMM of eq. 6 (arXiv 2410.01497).

    Args:
        max_context: capacity of each sequence's cache, in tokens.
        sequences: G.

    Attributes:
        lengths: cached tokens of each sequence, [G].
        labels: identifies each sequence's fusion; `reuse` compares it.
        captures: whether steps are captured as CUDA graphs, if the session can.
    """

    def __init__(self, backbone: Backbone, max_context: int, sequences: int = 1) -> None:
        entry = backbone.entry
        self.lengths = np.zeros(sequences, np.int32)
        self.labels: list[Hashable] = [None] * sequences
        self.captures = True
        self.max_context = max_context
        self._vocab_size = entry.vocab_size
        self._dtype = np.dtype(entry.dtype)
        self._backbone = backbone
        self._session = backbone.session
        self._kind = backbone.device.kind
        self._binding = backbone.session.io_binding()
        self._bound: tuple[int, int] | None = None  # first sequence and number of sequences
        self._locations: Hashable = None  # of all bound tensors; None: unknown
        self._cache = make_cache(entry, sequences, max_context, self._kind)
        self._shared: dict[str, BoundTensor] = {}
        self._slots: dict[str, BoundTensor | DeviceTensor] = {}
        # The tokens in each cache, each with the label of the fusion that computed it.
        self._written: list[list[tuple[int, Hashable]]] = [[] for _ in range(sequences)]
        self._tokens = sequence_tensor(np.zeros((sequences, 1), np.int64), self._kind)
        self._seqlens = sequence_tensor(np.zeros(sequences, np.int32), self._kind)
        logits = np.zeros((sequences, 1, self._vocab_size), self._dtype)
        self._logits = sequence_tensor(logits, self._kind)
        self._position = BoundTensor(np.zeros(1, np.int64), self._kind)
        self._total = np.zeros((), np.int32)  # attention reads it in host memory
        self._total_value = ort.OrtValue.ortvalue_from_numpy(self._total)
        self._binding.bind_ortvalue_input("total_sequence_length", self._total_value)
        self._position.bind_input(self._binding, "logit_positions", 0, 1)
        self._verifier: Verifier | None = None

    @property
    def can_verify(self) -> bool:
        """Whether `verify` works. WebGPU reads the lengths that it computes itself as 0."""
        return self._kind != "webgpu"

    @property
    def longest_pass(self) -> int:
        """The most tokens that one pass may append."""
        return self._backbone.prefill_chunk

    @property
    def cache_bytes(self) -> int:
        """Allocated size of all caches."""
        return sum(buffer.host.nbytes for buffer in self._cache.values())

    def set_shared_inputs(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Bind the graph inputs that all fusions and sequences share."""
        self._shared = {name: BoundTensor(tensor, self._kind) for name, tensor in tensors.items()}
        for name, tensor in self._shared.items():
            tensor.bind_input(self._binding, name, 0, tensor.shape[0])

    def set_fusion(self, tensors: Mapping[str, npt.NDArray[Any] | DeviceTensor]) -> None:
        """Bind a fuser's graph inputs [G, ...]; they apply from the next pass on."""
        with engine_errors(self._kind):
            for name, tensor in tensors.items():
                self._bind_slot(name, tensor)

    def _bind_slot(self, name: str, tensor: npt.NDArray[Any] | DeviceTensor) -> None:
        current = self._slots.get(name)
        if current is not None and current.is_backed_by(tensor):
            current.upload()  # its address is bound already
            return
        self._locations = None
        self._slots[name] = (
            tensor if isinstance(tensor, DeviceTensor) else sequence_tensor(tensor, self._kind)
        )
        if self._bound is not None:
            self._slots[name].bind_input(self._binding, name, *self._bound)

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Drop all but the first `length` tokens of a sequence's cache."""
        del self._written[sequence][length:]
        self.lengths[sequence] = len(self._written[sequence])

    def reuse(self, ids: Sequence[int], sequence: int = 0) -> int:
        """Keep the part of a sequence's cache that a prefill of `ids` would compute again.

        That is the longest common prefix computed under the sequence's current fusion.

        Returns:
            The number of tokens kept.
        """
        kept = self.shared(ids, self.labels[sequence], sequence)
        self.truncate(kept, sequence)
        return kept

    def shared(self, ids: Sequence[int], label: Hashable, sequence: int = 0) -> int:
        """How many of the first tokens a sequence's cache has of `ids`, under that fusion."""
        pairs = zip(self._written[sequence], ((id_, label) for id_ in ids), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def move(self, source: int, target: int) -> None:
        """Copy one sequence's cache over another's; the caller moves the fusion."""
        self.copy_cache(self, source, target)

    def copy_cache(
        self, other: Decoder, source: int = 0, target: int = 0, length: int | None = None
    ) -> None:
        """Copy the first `length` tokens (all, if None) of another decoder's sequence."""
        length = int(other.lengths[source]) if length is None else length
        for name, buffer in self._cache.items():
            buffer.copy_tokens(other._cache[name], source, target, length)
        self._copy_state(other, source, target)
        self.truncate(length, target)

    def first_run(self, sequence: int) -> tuple[list[int], Hashable]:
        """The first tokens of a sequence's cache that one fusion computed, and its label."""
        written = self._written[sequence]
        label = written[0][1] if written else None
        return [token for token, by in takewhile(lambda entry: entry[1] == label, written)], label

    def read(self, sequence: int, start: int, stop: int) -> Values:
        """A copy of the keys and values of some tokens."""
        return np.stack([buffer.host[sequence, :, start:stop] for buffer in self._cache.values()])

    def write(self, sequence: int, ids: Sequence[int], blocks: Sequence[Values]) -> None:
        """Replace a sequence's cache by these tokens, whose keys and values `read` gave in blocks
        of one size; they count as computed under the sequence's fusion."""
        for index, buffer in enumerate(self._cache.values()):
            for at, block in enumerate(blocks):
                size = block.shape[2]
                buffer.host[sequence, :, at * size : (at + 1) * size] = block[index]
        self.truncate(0, sequence)
        self._record(sequence, ids)
        self.lengths[sequence] = len(ids)

    def _copy_state(self, other: Decoder, source: int, target: int) -> None:
        self.lengths[target] = other.lengths[source]
        self._written[target] = list(other._written[source])
        self.labels[target] = other.labels[source]

    def step(self, tokens: Sequence[int], interrupt: Interrupt | None = None) -> Logits:
        """Append tokens[i] to sequence i.

        Returns:
            The logits [len(tokens), V], valid until the next pass.

        Raises:
            Cancelled: the interrupt was set; the cache is unchanged.
        """
        self._tokens.host[: len(tokens), 0] = tokens
        self._tokens.upload()
        self._step(len(tokens), interrupt)
        for sequence, token in enumerate(tokens):
            self._record(sequence, [token])
        return cast("Logits", self._logits.host[: len(tokens), 0])

    def _step(self, count: int, interrupt: Interrupt | None) -> None:
        """Run the first sequences, in one pass or, where each has buffers of its own, in turn."""
        if self._kind != "webgpu":
            return self._run(0, count, 1, interrupt=interrupt)
        before = self.lengths.copy()
        try:
            for sequence in range(count):
                self._run(sequence, 1, 1, interrupt=interrupt)
        except BaseException:
            self.lengths[:] = before
            raise

    def prefill(
        self, ids: Sequence[int], sequence: int = 0, interrupt: Interrupt | None = None
    ) -> Logits:
        """Append tokens to one sequence, `longest_pass` at a time.

        Returns:
            The logits [V] after the last token, valid until the next pass.

        Raises:
            UsageError: `ids` is empty.
            Cancelled: the interrupt was set; the cache keeps the finished chunks.
        """
        if not ids:
            raise UsageError("there are no tokens to prefill", "Pass at least one")
        for start in range(0, len(ids), self.longest_pass):
            chunk = np.asarray(ids[start : start + self.longest_pass], np.int64)[None]
            self._run(sequence, 1, chunk.shape[1], chunk, interrupt)
            self._record(sequence, chunk[0].tolist())
        return cast("Logits", self._logits.host[sequence, 0])

    def all_logits(self, ids: Sequence[int]) -> Logits:
        """Append S tokens to the first sequence in one pass.

        Returns:
            The logits [S, V] after each token.
        """
        chunk = np.asarray(ids, np.int64)[None]
        zeros = np.zeros((1, chunk.shape[1], self._vocab_size), self._dtype)
        logits = BoundTensor(zeros, self._kind)
        positions = BoundTensor(np.arange(chunk.shape[1], dtype=np.int64), self._kind)
        self._bind(0, 1)
        positions.bind_input(self._binding, "logit_positions", 0, chunk.shape[1])
        logits.bind_output(self._binding, "logits", 0, 1)
        try:
            self._run(0, 1, chunk.shape[1], chunk)
            self._record(0, ids)
        finally:
            self._bound = None
            self._position.bind_input(self._binding, "logit_positions", 0, 1)
        logits.download()
        return cast("Logits", logits.host[0])

    def verify(self, tokens: Sequence[int], interrupt: Interrupt | None = None) -> Logits:
        """Append at most VERIFY_TOKENS tokens to the first sequence in one pass.

        Logits and cache equal those of S steps bit for bit. The first call loads the weights a
        second time.

        Returns:
            The logits [S, V] after each token, valid until the next call.

        Raises:
            ResourceError: the cache cannot take VERIFY_TOKENS more tokens.
            Cancelled: the interrupt was set; the cache is unchanged.
        """
        if interrupt is not None:
            interrupt.check()
        self._check_room(int(self.lengths[0]) + VERIFY_TOKENS)
        if self._verifier is None:
            self._verifier = Verifier(self._backbone, self._cache, self._shared)
        with engine_errors(self._kind):
            self._verifier.bind_slots(self._slots)
            logits = self._verifier.run(tokens, int(self.lengths[0]), interrupt)
        self.lengths[0] += len(tokens)
        self._record(0, tokens)
        return logits

    def _record(self, sequence: int, ids: Sequence[int]) -> None:
        self._written[sequence] += [(token, self.labels[sequence]) for token in ids]

    def _run(
        self,
        first: int,
        count: int,
        added: int,
        chunk: npt.NDArray[np.int64] | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        """Run one pass that appends `added` tokens to each of `count` sequences from `first`.

        Args:
            chunk: a prompt's tokens [1, added]; None takes the token buffer.
        """
        if interrupt is not None:
            interrupt.check()
        totals = self.lengths[first : first + count] + added
        longest = int(totals.max())
        self._check_room(longest)
        with engine_errors(self._kind):
            self._bind(first, count)
            self._seqlens.host[first : first + count] = totals - 1  # index of the last token
            self._seqlens.upload()
            graph_id = self._graph_id(first, count, chunk is not None)
            # A captured step is replayed with the total it was captured with.
            self._total[()] = self.max_context if graph_id not in (None, NOT_CAPTURED) else longest
            self._position.host[0] = added - 1
            self._position.upload()
            if chunk is not None:
                prompt = BoundTensor(chunk, self._kind)  # a local: bindings hold no reference
                prompt.bind_input(self._binding, "input_ids", 0, 1)
            try:
                run_bound(self._session, self._binding, interrupt, graph_id)
                self._logits.download(first, count)
            finally:
                if chunk is not None:
                    self._tokens.bind_input(self._binding, "input_ids", first, count)
        self.lengths[first : first + count] = totals

    def _graph_id(self, first: int, count: int, is_prompt: bool) -> int | None:
        """The pass's CUDA graph id; None if the session captures none."""
        cuda_graphs = self._backbone.cuda_graphs
        if cuda_graphs is None:
            return None
        if is_prompt or not self.captures:
            return NOT_CAPTURED
        if self._locations is None:
            changing = [*self._cache.values(), *self._slots.values()]
            fixed = [self._tokens, self._seqlens, self._logits]
            self._locations = (
                self._position.location(0, 1),
                *(tensor.location(first, count) for tensor in (*fixed, *changing)),
            )
        return cuda_graphs.graph_id(self._locations)

    def _check_room(self, tokens: int) -> None:
        if tokens > self.max_context:
            raise ResourceError(
                f"the cache holds {self.max_context} tokens, {tokens} are needed",
                "Load the bundle with a larger max_context",
            )

    def _bind(self, first: int, count: int) -> None:
        """Bind all tensors of these sequences, unless they are bound already."""
        if self._bound == (first, count):
            return
        # Reset first: after a failure halfway nothing counts as bound.
        self._bound = self._locations = None
        self._tokens.bind_input(self._binding, "input_ids", first, count)
        self._seqlens.bind_input(self._binding, "seqlens_k", first, count)
        self._logits.bind_output(self._binding, "logits", first, count)
        for name, buffer in self._cache.items():
            buffer.bind_input(self._binding, f"past_key_values.{name}", first, count)
            buffer.bind_output(self._binding, f"present.{name}", first, count)
        for name, slot in self._slots.items():
            slot.bind_input(self._binding, name, first, count)
        self._bound = (first, count)
