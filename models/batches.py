"""Examples as a network reads them: windows of ids in batches, and what should come out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from dlp_edge.models.router_examples import Example
from dlp_edge.runtime.routing.router_input import ANSWER_SEGMENTS, RouterInputEncoder

# Shares of a window's tokens that are left out in training, so that no single word is leaned on.
GAPS = (0.0, 0.1, 0.3)
BUCKET = 16  # batches whose examples are sorted by length together, for less padding
MEASURE_BATCH = 256

Scorer = Callable[[Tensor, Tensor], Tensor]


class Windows:
    """n windows of ids, and targets [n, R] that sum to 1.

    Args:
        loose: additional inputs, which are out-of-scope.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        reader: RouterInputEncoder,
        num_rows: int,
        separator: int,
        loose: Sequence[list[int]] = (),
    ) -> None:
        found = (reader.encode(example.prompt, example.generated) for example in examples)
        self.ids = [np.array(ids, np.int32) for ids in chain(found, loose)]
        self.separator = separator
        self.targets = torch.zeros(len(self.ids), num_rows)
        self.targets[len(examples) :, -1] = 1
        for row, example in enumerate(examples):
            for label, weight in example.weights.items():
                self.targets[row, label] = weight

    def __len__(self) -> int:
        return len(self.ids)

    def batch(
        self, rows: Sequence[int], gaps: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """input_ids [B, L] int64 and mask [B, L] bool of some windows, with `gaps` made anew."""
        windows = [self.ids[row] for row in rows]
        if gaps is not None:
            windows = [self._with_gaps(ids, gaps) for ids in windows]
        batch = np.full((len(rows), max(map(len, windows))), -1, np.int64)
        for row, ids in enumerate(windows):
            batch[row, : len(ids)] = ids
        found = torch.from_numpy(batch)
        return found.clamp(min=0), found >= 0

    def shuffled(self, size: int, rng: random.Random) -> Iterator[list[int]]:
        """Batches of rows of about equal extents, in random order."""
        order = rng.sample(range(len(self)), len(self))
        batches: list[list[int]] = []
        for start in range(0, len(order), BUCKET * size):
            bucket = sorted(order[start : start + BUCKET * size], key=self._extent)
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        rng.shuffle(batches)
        return iter(batches)

    def through(self, scorer: Scorer, rows: Sequence[int] | None = None) -> Tensor:
        """What a network gives for the windows (or some of them), without gradients: [n, W]."""
        wanted = list(range(len(self))) if rows is None else list(rows)
        order = sorted(range(len(wanted)), key=lambda at: len(self.ids[wanted[at]]))
        parts = []
        with torch.no_grad():
            for start in range(0, len(order), MEASURE_BATCH):
                chosen = [wanted[at] for at in order[start : start + MEASURE_BATCH]]
                parts.append(scorer(*self.batch(chosen)))
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
        return torch.cat(parts)[back]

    def rarity(self, vocab_size: int) -> Tensor:
        """[V]: how rare each id is, from 0 (in every window) to 2 (in few)."""
        seen = np.zeros(vocab_size)
        for ids in self.ids[::7]:
            seen[np.unique(ids)] += 1
        return torch.from_numpy(
            np.clip(np.log(len(self.ids[::7]) / (seen + 1)) / 4, 0, 2).astype(np.float32)
        )

    def _extent(self, row: int) -> tuple[bool, int]:
        """Whether a window has an answer, and its length."""
        ids = self.ids[row]
        return bool((ids[-ANSWER_SEGMENTS:] != self.separator).any()), len(ids)

    def _with_gaps(self, ids: np.ndarray, gaps: np.random.Generator) -> np.ndarray:
        kept = gaps.random(len(ids)) >= GAPS[int(gaps.integers(len(GAPS)))]
        return ids[kept | (ids == self.separator)]
