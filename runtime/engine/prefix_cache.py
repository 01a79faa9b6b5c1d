"""The KV cache of prefixes that requests share: system prompts, and conversations so far."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from dlp_edge.runtime.engine.decoder import Decoder, Values

BLOCK = 16  # tokens that are kept or dropped together

# The block before (0: none), the fusion that computed it, and its tokens. Blocks after the first
# depend on all before them, and so do their keys: a prefix is found only where all of it is equal.
_Key = tuple[int, Hashable, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Block:
    """Keys and values of BLOCK tokens, and the number by which the next block names it."""

    number: int
    values: Values


class PrefixCache:
    """Blocks of tokens' keys and values on the host; beyond the budget the oldest go.

    Args:
        budget: bytes of all blocks together.

    Attributes:
        bytes: of the blocks that it holds.
    """

    def __init__(self, budget: int) -> None:
        self.bytes = 0
        self._budget = budget
        self._last = 0
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()  # least recently used first

    def length(self, ids: Sequence[int], label: Hashable) -> int:
        """How many of the first tokens it has under that fusion."""
        return BLOCK * sum(1 for _ in self._chain(ids, label))

    def restore(self, decoder: Decoder, sequence: int, ids: Sequence[int]) -> int:
        """Copies what it has of the first tokens into a sequence's cache, under the sequence's
        fusion; returns their number."""
        chain = list(self._chain(ids, decoder.labels[sequence]))
        self._touch([key for key, _ in chain])
        values = [block.values for _, block in chain]
        decoder.write(sequence, ids[: BLOCK * len(chain)], values)
        return BLOCK * len(chain)

    def store(self, decoder: Decoder, sequence: int) -> None:
        """Keeps the tokens of a sequence's cache that one fusion computed from the first on."""
        ids, label = decoder.first_run(sequence)
        parent, keys = 0, []
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            key = (parent, label, tuple(ids[start : start + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                values = decoder.read(sequence, start, start + BLOCK)
                if values.nbytes > self._budget:
                    return
                self._last += 1
                block = self._blocks[key] = _Block(self._last, values)
                self.bytes += values.nbytes
            keys.append(key)
            parent = block.number
        self._touch(keys)
        while self.bytes > self._budget:
            _, oldest = self._blocks.popitem(last=False)
            self.bytes -= oldest.values.nbytes

    def _chain(self, ids: Sequence[int], label: Hashable) -> Iterator[tuple[_Key, _Block]]:
        parent = 0
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            key = (parent, label, tuple(ids[start : start + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                return
            yield key, block
            parent = block.number

    def _touch(self, keys: Sequence[_Key]) -> None:
        """The first block becomes the most recent: without it the others cannot be found."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)
