"""From logits to the next token, in time that hardly depends on the size of the vocabulary.

A sampler needs the probabilities in descending order, but only up to the token that it draws. It
sorts the largest logits, and all of them only where these do not decide. It sorts values, not ids:
the id is looked up once the value is known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Sampler = Callable[[npt.NDArray[np.floating]], int]
_Scores = npt.NDArray[np.float32]

_HEAD = 128  # logits that are sorted first; they hold most of the probability
_GROUPS = 1024  # the maxima of so many groups of logits bound the largest from below
_LEAST_TEMPERATURE = 1e-30  # single precision divides by no less


def make_sampler(
    temperature: float, top_p: float, top_k: int, seed: int | None, min_p: float = 0.0
) -> Sampler:
    """A sampler: logits [V] -> token id.

    temperature 0 is greedy (ties: the lowest id). Otherwise logits / temperature, then the top_k
    largest (0: all), then the smallest set whose probability reaches top_p, then those at least
    min_p times as probable as the first, renormalised. The same seed gives the same tokens for
    the same logits.
    """
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    return _RandomSampler(max(temperature, _LEAST_TEMPERATURE), top_p, top_k, seed, min_p)


class _RandomSampler:
    """Draws by inverting the cumulative distribution over the tokens in descending order."""

    def __init__(
        self, temperature: float, top_p: float, top_k: int, seed: int | None, min_p: float
    ) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._top_k = top_k
        self._min_p = min_p
        self._generator = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[np.floating]) -> int:
        scores: _Scores = logits.astype(np.float32, copy=False)
        size = len(scores)
        point = float(self._generator.random())
        if 0 < self._top_k < size:
            values = largest(scores, self._top_k)
            index = self._draw(values, point, None)
        else:
            total = _exp_sum(scores, self._temperature)
            values = largest(scores, min(_HEAD, size))
            index = self._draw(values, point, total if len(values) < size else None)
            if index is None:
                values = largest(scores, size)
                index = self._draw(values, point, None)
        assert index is not None  # all values were given
        return _id_at(scores, values, index)

    def _draw(self, values: _Scores, point: float, total: float | None) -> int | None:
        """The index of the token at `point` in [0, 1) of the distribution.

        Args:
            values: the largest scores, in descending order.
            total: the weight of all tokens, of which these are some; None if these are all.

        Returns:
            None if other tokens have to be known.
        """
        with np.errstate(over="ignore"):  # -inf is right for a temperature near 0
            weights = np.exp((values.astype(np.float64) - values[0]) / self._temperature)
        sums = weights.cumsum()
        count = len(values)
        mass = sums[-1] if total is None else total
        kept = count if total is None else count + 1  # count + 1: all of these, and others
        if self._top_p < 1:
            kept = min(kept, int(sums.searchsorted(self._top_p * mass)) + 1)
        if self._min_p > 0:
            probable = int(np.count_nonzero(weights >= self._min_p))
            kept = min(kept, probable) if probable < count else kept
        if kept <= count:
            mass = sums[kept - 1]
        elif self._top_p < 1 or self._min_p > 0:
            return None
        index = int(sums.searchsorted(point * mass, side="right"))
        if kept <= count:
            return min(index, kept - 1)
        return index if index < count else None


def largest(scores: _Scores, count: int) -> _Scores:
    """The `count` largest scores, in descending order."""
    if count < len(scores):
        if count <= _GROUPS // 8 and len(scores) >= 16 * _GROUPS:
            # At least `count` scores reach the bound: the maxima of `count` groups do.
            whole = scores[: len(scores) // _GROUPS * _GROUPS]
            bound = np.partition(whole.reshape(-1, _GROUPS).max(axis=0), -count)[-count]
            scores = scores[scores >= bound]
        scores = np.partition(scores, -count)[-count:]
    return np.sort(scores)[::-1]


def largest_ids(logits: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.intp]:
    """The ids of the `count` largest logits, in descending order (ties: the lowest id first)."""
    if count == 0:
        return np.empty(0, np.intp)
    scores: _Scores = logits.astype(np.float32, copy=False)
    ids = np.flatnonzero(scores >= largest(scores, min(count, len(scores)))[-1])
    return ids[np.argsort(-scores[ids], kind="stable")][:count]


def _id_at(scores: _Scores, values: _Scores, index: int) -> int:
    """The id whose score is values[index]; of equal scores, the first value has the lowest id."""
    value = values[index]
    rank = index - int(np.argmax(values == value))
    return int(np.flatnonzero(scores == value)[rank])


def _exp_sum(scores: _Scores, temperature: float) -> float:
    """The sum of exp((score - largest) / temperature), to about seven digits."""
    with np.errstate(over="ignore"):
        shifted = scores - scores.max()
        shifted /= np.float32(temperature)
        np.exp(shifted, out=shifted)
    return float(shifted.sum())


def penalise(
    logits: npt.NDArray[np.floating], seen: npt.NDArray[np.bool_], penalty: float
) -> npt.NDArray[np.floating]:
    """The logits [V] with those of the tokens seen [V] made less likely: divided by the penalty
    where positive, multiplied where negative (CTRL, arXiv 1909.05858; as transformers does)."""
    ids = np.flatnonzero(seen)
    before = logits[ids]
    result: npt.NDArray[np.floating] = logits.copy()
    result[ids] = np.where(before > 0, before / penalty, before * penalty)
    return result


def log_probabilities(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """log softmax of logits [V]."""
    shifted = logits.astype(np.float64) - logits.max()
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def log_probabilities_of(
    logits: npt.NDArray[np.floating], ids: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """log softmax of logits [V] for some ids, to about seven digits."""
    scores: _Scores = logits.astype(np.float32, copy=False)
    shifted = scores[ids].astype(np.float64) - scores.max()
    result: npt.NDArray[np.float64] = shifted - np.log(_exp_sum(scores, 1.0))
    return result
