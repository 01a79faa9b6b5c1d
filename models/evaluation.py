"""Evaluates a router: accuracy, calibration and confusion matrix on held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BINS = 15


@dataclass(frozen=True)
class Measured:
    """Metrics of one kind of held-out examples.

    Attributes:
        examples: their number; the other values are None if it is 0.
        accuracy: the share whose most probable adapter is the right one.
        calibration_error: expected calibration error (Guo et al. 2017) of the probability of the
            most probable adapter, which selection acts on: the mean gap between it and the
            accuracy over BINS equal intervals.
        kept: the share with confidence of at least `min_confidence`, which get an adapter.
    """

    examples: int
    accuracy: float | None
    calibration_error: float | None
    kept: float | None


@dataclass(frozen=True)
class Judged:
    """A router's predictions for n examples.

    Attributes:
        probabilities: over the N adapters, given that the text is in scope, [n, N].
        doubt: probability that the text is out of scope, [n].
        labels: the right adapter, [n].
    """

    probabilities: Array
    doubt: Array
    labels: npt.NDArray[np.int64]

    @property
    def largest(self) -> Array:
        """The probability of the most probable adapter, given that the text is in scope."""
        found: Array = self.probabilities.max(1)
        return found

    @property
    def confidence(self) -> Array:
        found: Array = self.largest * (1 - self.doubt)
        return found

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = self.probabilities.argmax(1) == self.labels
        return found


def judged(scores: Array, labels: Sequence[int], num_labels: int, temperature: float) -> Judged:
    """From scores z [n, R], whose columns after `num_labels` are out-of-scope rows."""
    z = scores / temperature
    z = np.exp(z - z.max(1, keepdims=True))
    own = z[:, :num_labels]
    doubt = 1 - own.sum(1) / z.sum(1)
    return Judged(own / own.sum(1, keepdims=True), doubt, np.array(labels, np.int64))


def measure(found: Judged, min_confidence: float) -> Measured:
    """The metrics of one kind of examples."""
    if not len(found.labels):
        return Measured(0, None, None, None)
    return Measured(
        examples=len(found.labels),
        accuracy=round(float(found.hits.mean()), 4),
        calibration_error=round(calibration_error(found.largest, found.hits), 4),
        kept=round(float((found.confidence >= min_confidence).mean()), 4),
    )


def calibration_error(largest: Array, hits: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error, in [0, 1]."""
    return float(sum(share * abs(mean - hit) for share, mean, hit in reliability(largest, hits)))


def reliability(largest: Array, hits: npt.NDArray[np.bool_]) -> list[tuple[float, float, float]]:
    """(share of the examples, mean probability, accuracy) of each non-empty bin."""
    interval = np.minimum((largest * BINS).astype(int), BINS - 1)
    found = []
    for index in range(BINS):
        inside = interval == index
        if inside.any():
            parts = (inside.mean(), largest[inside].mean(), hits[inside].mean())
            found.append((float(parts[0]), float(parts[1]), float(parts[2])))
    return found


def confusions(found: Judged, num_labels: int) -> npt.NDArray[np.int64]:
    """[N, N]: counts by right adapter (rows) and most probable adapter (columns)."""
    table = np.zeros((num_labels, num_labels), np.int64)
    np.add.at(table, (found.labels, found.probabilities.argmax(1)), 1)
    return table
