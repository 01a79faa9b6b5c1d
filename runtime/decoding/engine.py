"""A decoder with what fills its adapter slots: fusing, prefilling and recomputing a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlp_edge.bundle.adapter_stack import AdapterStack
from dlp_edge.runtime.engine.backbone import Backbone
from dlp_edge.runtime.engine.decoder import Decoder, Logits
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.engine.prefix_cache import PrefixCache
from dlp_edge.runtime.engine.self_check import TOLERANCE
from dlp_edge.runtime.fusion.fuser import Fuser, make_fuser

PROMPT, REPLAYS = 8, 3  # to compare captured steps; the first run of a capture is a plain one


@dataclass(frozen=True)
class Engine:
    """A decoder and what fills its adapter slots, for the same number of sequences.

    Attributes:
        reuse: whether a prompt keeps what the cache has of it already, if it was written under
            the same fusion. Rounding then depends on what came before.
        prefixes: of other requests, likewise.
    """

    decoder: Decoder
    fuser: Fuser
    reuse: bool = False
    prefixes: PrefixCache | None = None

    def fuse(self, fusion: Mapping[str, float], sequence: int = 0) -> None:
        """Fills a sequence's slots with adapter -> weight; in force from the next pass on."""
        self.decoder.set_fusion(self.fuser.fuse(fusion, sequence))
        self.decoder.labels[sequence] = frozenset(fusion.items())

    def prefill(
        self, prompt: Sequence[int], sequence: int, interrupt: Interrupt
    ) -> tuple[Logits, int]:
        """Reads a prompt; returns the logits [V] after it, and how many of its tokens the cache
        had already."""
        reused = self.take_over(prompt, sequence)
        logits = self.decoder.prefill(prompt[reused:], sequence, interrupt)
        self.remember(sequence)
        return logits, reused

    def take_over(self, prompt: Sequence[int], sequence: int, home: Decoder | None = None) -> int:
        """Keeps what the cache has of a prompt under the present fusion, if the engine reuses, and
        drops the rest; returns the number of tokens kept.

        Args:
            home: another decoder whose first sequence may have more of it, to be copied.
        """
        decoder, wanted = self.decoder, prompt[:-1]  # the last token's logits are wanted
        label = decoder.labels[sequence]
        kept = decoder.shared(wanted, label, sequence) if self.reuse else 0
        there = home.shared(wanted, label) if home is not None else 0
        if self.prefixes is not None and self.prefixes.length(wanted, label) > max(kept, there):
            return self.prefixes.restore(decoder, sequence, wanted)
        if home is not None and there > kept:
            decoder.copy_cache(home, 0, sequence, there)
            decoder.labels[sequence] = label
            return there
        decoder.truncate(kept, sequence)
        return kept

    def remember(self, sequence: int) -> None:
        """Keeps what the cache has for other requests, if the engine does."""
        if self.prefixes is not None:
            self.prefixes.store(self.decoder, sequence)

    def recompute(self, history: Sequence[int], sequence: int, interrupt: Interrupt) -> None:
        """Reads all of a sequence again, under its present fusion."""
        self.decoder.truncate(0, sequence)
        self.decoder.prefill(history, sequence, interrupt)


def make_engine(
    backbone: Backbone,
    stack: AdapterStack,
    max_context: int,
    sequences: int = 1,
    reuse: bool = False,
    beside: Engine | None = None,
    prefixes: PrefixCache | None = None,
) -> Engine:
    """An engine whose sequences all have the base model's fusion.

    Args:
        beside: an engine over the same backbone and stack, with which it shares the adapters.
        prefixes: what it takes prefixes from, and keeps them in.
    """
    decoder = Decoder(backbone, max_context, sequences)
    fuser = beside.fuser.sibling(sequences) if beside else make_fuser(backbone, stack, sequences)
    decoder.set_shared_inputs(fuser.shared_inputs)
    decoder.set_fusion(fuser.fuse({}))
    return Engine(decoder, fuser, reuse or prefixes is not None, prefixes)


def captures_are_right(engine: Engine) -> bool:
    """Whether steps that are captured and replayed as CUDA graphs compute what others do.

    Uses the first sequence, and leaves it empty.
    """
    decoder, found = engine.decoder, []
    if decoder.max_context < PROMPT + 2:
        return True  # too small to tell, and to be of use
    for decoder.captures in (False, *[True] * REPLAYS):
        decoder.truncate(0)
        decoder.prefill(list(range(1, PROMPT)))
        steps = [decoder.step([token])[0].astype(np.float32) for token in (1, 2)]
        found.append(np.stack(steps))
    decoder.truncate(0)
    plain, *captured = found
    limit = TOLERANCE * float(np.sqrt(np.mean(plain**2)))
    return all(bool(np.abs(replayed - plain).max() <= limit) for replayed in captured)
