"""A decoder with what fills its adapter slots: fusing, prefilling and recomputing a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlp_edge.bundle.adapter_stack import AdapterStack
from dlp_edge.runtime.engine.backbone import Backbone
from dlp_edge.runtime.engine.decoder import Decoder, Logits
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.fusion.fuser import Fuser, make_fuser


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
