"""A generation whose fusions follow a script, by dlp-edge's loop and by PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dlp_edge.runtime.decoding.answer import Step
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.decoding.loop import stream_answer
from dlp_edge.runtime.decoding.sampling import Sampler
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.types import Chunk, KvPolicy
from tests.testing.oracle import Peft

Fusion = dict[str, float]


@dataclass
class ScriptedAnswer:
    """Changes its fusion at tokens of a script instead of at sentences.

    script: token -> the fusion from that token on. The token itself is written under the one
    before; -1 is the prompt's.
    """

    prompt_ids: Sequence[int]
    script: Mapping[int, Fusion]
    count: int
    kv: KvPolicy
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    logits: list[npt.NDArray[np.floating]] = field(default_factory=list)
    done: bool = False

    def begin(self) -> Fusion:
        return self.script[-1]

    def take(self, logits: npt.NDArray[np.floating], drafted: int | None = None) -> Step:
        self.logits.append(logits.copy())
        self.tokens.append(self.sampler(logits))
        at = len(self.tokens) - 1
        self.done = len(self.tokens) == self.count
        return Step([], self.script.get(at))

    def draft(self, most: int) -> list[int]:
        return []

    def finish(self) -> list[Chunk]:
        return []

    def record(self, **amounts: float) -> None:
        pass


def by_the_loop(engine: Engine, answer: ScriptedAnswer) -> None:
    """Fills in the answer's tokens and logits."""
    loop: Any = stream_answer
    assert list(loop(engine, answer, Interrupt())) == []


def by_peft(oracle: Peft, answer: ScriptedAnswer) -> list[npt.NDArray[np.float32]]:
    """The logits before each of the answer's tokens, by a PEFT model that keeps its cache over a
    change of fusion, or computes everything again."""
    oracle.forget()
    oracle.fuse(answer.script[-1])
    found = [oracle.extend(answer.prompt_ids)]
    for at, token in enumerate(answer.tokens[:-1]):
        if at in answer.script:
            oracle.fuse(answer.script[at])
            if answer.kv == "recompute":
                oracle.forget()
                oracle.extend([*answer.prompt_ids, *answer.tokens[:at]])
        found.append(oracle.extend([token]))
    return found


def script_of(names: Sequence[str], count: int) -> dict[int, Fusion]:
    """Changes at the first token, at the last, at two in a row, to the base model and back."""
    a, b, *rest = names
    every = {name: 1.0 / len(names) for name in names}
    return {
        -1: {a: 1.0},
        0: {b: 1.0},
        40: {a: 0.6, b: 0.4},
        41: {b: 0.3, **dict.fromkeys(rest[:1], 0.7)},
        150: {},
        230: {a: 1.0},
        231: {},
        232: {a: 1.0},
        500: every,
        count // 2 + 200: {b: 1.0},
        count - 2: {a: 1.0},
        count - 1: {b: 1.0},
    }
