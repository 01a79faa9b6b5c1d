"""A decoder with what fills its adapter slots: fusing, prefilling and recomputing a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlp_edge.bundle.adapter_stack import AdapterStack
from dlp_edge.runtime.engine.backbone import Backbone
from dlp_edge.runtime.engine.decoder import Decoder, Logits
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.engine.self_check import TOLERANCE
from dlp_edge.runtime.fusion.fuser import Fuser, make_fuser

PROMPT, REPLAYS = 8, 3  # to compare captured steps; the first run of a capture is a plain one


@dataclass(frozen=True)
class Engine:
    """A decoder and what fills its adapter slots, for the same number of sequences.

    Attributes:
        reuse: whether a prompt keeps what the cache has of it already, if it was written under
            the same fusion. Rounding then depends on what came before.
    """

    decoder: Decoder
    fuser: Fuser
    reuse: bool = False

    def fuse(self, fusion: Mapping[str, float], sequence: int = 0) -> None:
        """Fills a sequence's slots with adapter -> weight; in force from the next pass on."""
        self.decoder.set_fusion(self.fuser.fuse(fusion, sequence))
        self.decoder.labels[sequence] = frozenset(fusion.items())

    def prefill(
        self, prompt: Sequence[int], sequence: int, interrupt: Interrupt
    ) -> tuple[Logits, int]:
        """Reads a prompt; returns the logits [V] after it, and how many of its tokens the cache
        had already."""
        # The last token is read again in any case: its logits are wanted.
        reused = self.decoder.reuse(prompt[:-1], sequence) if self.reuse else 0
        self.decoder.truncate(reused, sequence)
        return self.decoder.prefill(prompt[reused:], sequence, interrupt), reused

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
) -> Engine:
    """An engine whose sequences all have the base model's fusion.

    Args:
        beside: an engine over the same backbone and stack, with which it shares the adapters.
    """
    decoder = Decoder(backbone, max_context, sequences)
    fuser = beside.fuser.sibling(sequences) if beside else make_fuser(backbone, stack, sequences)
    decoder.set_shared_inputs(fuser.shared_inputs)
    decoder.set_fusion(fuser.fuse({}))
    return Engine(decoder, fuser, reuse)


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
