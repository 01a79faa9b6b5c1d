"""Metrics of an answer: chosen option, final number, BLEU and ROUGE.

BLEU is sacrebleu's (13a tokenisation, corpus level). ROUGE is rouge-score's (F1, no stemming, Latin
letters and digits only). This module alone defines what counts as a right answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from dlp_edge.tasks.samples import Sample

Kind = Literal["choice", "number", "text"]
ORDERS = 4  # BLEU counts n-grams of 1 to 4 tokens
_EDGES = " \t\n\"'“”‘’`*.,;:!?()[]{}<>"
_FINAL_NUMBER = re.compile(r"####\s*([-+]?[$€£]?\s*[-+]?[\d,]*\.?\d+)")
_BLEU = BLEU(effective_order=True)
_ROUGE = RougeScorer(["rouge1", "rougeL"])


@dataclass(frozen=True)
class Marks:
    """The scores of an answer to one sample, each from 0 to 1; None if it does not apply.

    Attributes:
        score: the headline: `right` for choices, `number` for final numbers, else `rouge_l`.
        right: whether the answer picks the right choice (`picked`).
        likelihood: whether the model finds the right choice most likely (`likeliest_is_right`).
        named: whether the right choice is the only one that the answer names anywhere
            (`named_choices`); more lenient towards models not trained on the format.
        number: whether the final number after `####` is right.
        exact: whether the whole answer equals the response, both normalised.
        rouge1, rouge_l: F1 against the response.
    """

    score: float
    right: float | None
    named: float | None
    likelihood: float | None
    number: float | None
    exact: float
    rouge1: float
    rouge_l: float


def kind_of(sample: Sample) -> Kind:
    """How a sample is scored: by its choices, by its final number, or as free text."""
    wanted = normalise(sample.response)
    if any(normalise(choice) == wanted for choice in sample.choices):
        return "choice"
    return "text" if final_number(sample.response) is None else "number"


def mark(answer: str, sample: Sample, logprobs: Sequence[float] | None = None) -> Marks:
    """Score an answer to a sample.

    Args:
        logprobs: log probability of each choice, if measured.
    """
    kind = kind_of(sample)
    wanted = normalise(sample.response)
    right = named = number = likelihood = None
    if kind == "choice":
        right = float(picked(answer, sample.choices) == wanted)
        named = float(named_choices(answer, sample.choices) == {wanted})
        likelihood = None if logprobs is None else likeliest_is_right(logprobs, sample)
    if kind == "number":
        number = float(final_number(answer) == final_number(sample.response))
    rouge1, rouge_l = rouge(answer, sample.response)
    score = right if right is not None else number if number is not None else rouge_l
    exact = float(normalise(answer) == wanted)
    return Marks(score, right, named, likelihood, number, exact, rouge1, rouge_l)


def likeliest_is_right(logprobs: Sequence[float], sample: Sample) -> float:
    """1 if the most likely choice is the right one (the first of ties), else 0."""
    best = sample.choices[int(np.argmax(logprobs))]
    return float(normalise(best) == normalise(sample.response))


def normalise(text: str) -> str:
    """Normalise to NFKC, case-folded, single spaces, and strip quotes, brackets and punctuation
    from the ends unless nothing else is left."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(_EDGES) or plain


def picked(answer: str, choices: Sequence[str]) -> str | None:
    """The choice, normalised, that an answer picks, or None.

    An answer picks a choice if it equals the choice, else if its first line does, else if its
    first line begins with the choice as whole words ("Valid, because ..." picks "Valid"). The
    longest of several wins.
    """
    offered = {normalise(choice) for choice in choices}
    lines = answer.strip().split("\n")
    for text in (normalise(answer), normalise(lines[0])):
        if text in offered:
            return text
    first = normalise(lines[0])
    begun = [choice for choice in offered if choice and _begins(first, choice)]
    return max(begun, key=len, default=None)


def named_choices(answer: str, choices: Sequence[str]) -> set[str]:
    """The choices, normalised, that occur in an answer as whole words, except inside a longer
    choice."""
    rest = normalise(answer)
    found: set[str] = set()
    for choice in sorted({normalise(choice) for choice in choices}, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(choice)}(?!\w)"
        if choice and re.search(pattern, rest):
            found.add(choice)
            rest = re.sub(pattern, "\0", rest)
    return found


def _begins(text: str, choice: str) -> bool:
    return re.match(rf"{re.escape(choice)}(?!\w|[.,]\d)", text) is not None


def final_number(text: str) -> float | None:
    """The number after the last `####`, as in GSM8K; None if there is none."""
    found = _FINAL_NUMBER.findall(text)
    if not found:
        return None
    try:
        return float(re.sub(r"[,$€£\s]", "", found[-1]))
    except ValueError:
        return None


@lru_cache(maxsize=100_000)
def rouge(answer: str, response: str) -> tuple[float, float]:
    """F1 of ROUGE-1 and ROUGE-L."""
    scores = _ROUGE.score(response, answer)
    return float(scores["rouge1"].fmeasure), float(scores["rougeL"].fmeasure)


def bleu_counts(answer: str, response: str) -> npt.NDArray[np.float64]:
    """The BLEU statistics of one answer, which add up over a corpus [2 * ORDERS + 2]: matched and
    total n-grams of each order, then the lengths of answer and response."""
    found = _BLEU.sentence_score(answer, [response])
    counts = [*found.counts, *found.totals, found.sys_len, found.ref_len]
    return np.array(counts, np.float64)


def bleu(counts: npt.NDArray[np.float64]) -> float:
    """Corpus BLEU, 0 to 1, from summed counts (sacrebleu's exponential smoothing)."""
    whole: list[Any] = counts.astype(int).tolist()
    correct, total = whole[:ORDERS], whole[ORDERS : 2 * ORDERS]
    found = BLEU.compute_bleu(correct, total, whole[-2], whole[-1], smooth_method="exp")
    return float(found.score) / 100
