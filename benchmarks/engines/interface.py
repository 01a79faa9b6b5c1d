"""What `benchmarks.peers` asks of an engine."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and how long they took, in seconds: `prefill` up to and with the first token,
    `decode` for all others."""

    tokens: list[int]
    prefill: float
    decode: float


class Engine(Protocol):
    """A backbone that is loaded, with room for `room` tokens, on `threads` threads."""

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Fuses adapters with these weights from now on; none is the base model."""

    def generate(self, ids: Sequence[int], count: int) -> Answer:
        """Reads a prompt from nothing and writes `count` tokens after it, the most probable ones,
        whether they end an answer or not."""

    def loss(self, ids: Sequence[int]) -> float:
        """Mean negative log likelihood of ids[1:]."""


class TokenLoop(ABC):
    """`generate` of an engine that reads a prompt and appends single tokens."""

    @abstractmethod
    def prefill(self, ids: Sequence[int]) -> int:
        """Reads a prompt from nothing; returns the most probable next token."""

    @abstractmethod
    def step(self, token: int) -> int:
        """Appends a token; returns the most probable next one."""

    def generate(self, ids: Sequence[int], count: int) -> Answer:
        begun = time.perf_counter()
        tokens = [self.prefill(ids)]
        prefilled = time.perf_counter()
        for _ in range(count - 1):
            tokens.append(self.step(tokens[-1]))
        return Answer(tokens, prefilled - begun, time.perf_counter() - prefilled)


def mean_loss(logits: Logits, ids: Sequence[int]) -> float:
    """Mean negative log likelihood of ids[1:] under logits [S, V], or [S - 1, V]."""
    scores = logits[: len(ids) - 1].astype(np.float32)
    top = scores.max(axis=1)
    log_sum = top + np.log(np.exp(scores - top[:, None]).sum(axis=1, dtype=np.float64))
    chosen = scores[np.arange(len(scores)), np.asarray(ids[1:])]
    return float((log_sum - chosen).mean())
