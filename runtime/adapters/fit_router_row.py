"""Teaching a router a new skill from a few examples: one more row of its last layer.

The graph stays as it is. The new row (w, b) is a logistic regression over its features: how much
more likely is the new skill than all that the router knows already, log sum exp of its other
scores? So the other rows need not move, and what they say of each other stays the same. The
features that the head keeps of every old skill are the counter-examples. The row reads what was
pooled rather than the features of the trained rows, which tell apart what training told apart and
little else. The loss is convex, so Newton's method finds its minimum in some steps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dlp_edge.bundle.router_head import RouterHead
from dlp_edge.errors import UsageError
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.text.sentences import SentenceSplitter
from dlp_edge.tasks.boilerplate import CommonText
from dlp_edge.tasks.samples import Sample, as_sample

MIN_EXAMPLES = 5
MAX_EXAMPLES = 1_000
KEPT_FEATURES = 48  # of each skill, for rows that are fitted later
RIDGE = 1e-3  # on the weights, over the mean loss
STEPS = 30

Array = npt.NDArray[np.float64]


def as_samples(examples: Sequence[str | Mapping[str, object]]) -> list[Sample]:
    """Examples as an application gives them: prompts, or {"prompt", "response"?, "choices"?}.

    Raises:
        UsageError: they are no list, too few or too many.
        RouterError: one of them is wrong.
    """
    if isinstance(examples, str) or not isinstance(examples, Sequence):
        raise UsageError("the examples are no list", "Give a list of prompts")
    if not MIN_EXAMPLES <= len(examples) <= MAX_EXAMPLES:
        raise UsageError(
            f"{len(examples)} examples were given",
            f"Give {MIN_EXAMPLES} to {MAX_EXAMPLES}, best 20 or more; or none at all, and the "
            "adapter can be pinned but is never routed to",
        )
    return [
        as_sample(
            {"prompt": example} if isinstance(example, str) else example,
            f"example {number}",
            response_needed=False,
        )
        for number, example in enumerate(examples, 1)
    ]


def fit_router_row(router: Router, samples: Sequence[Sample]) -> RouterHead:
    """The router's last layer with a row for a new skill, after those of its labels."""
    found = np.stack([router.features(*window) for window in router_texts(samples)])
    head, scale = router.head, router.settings.temperature
    head = head.without(_obsolete_rows(head, found, len(router.labels)))
    weight, bias = fit_row(head, found, scale, _unused_features(head, len(router.labels)))
    kept = found[_sample_indices(len(found), KEPT_FEATURES)]
    return head.with_row(len(router.labels), weight, bias, kept.astype(np.float16))


def _obsolete_rows(head: RouterHead, found: npt.NDArray[np.float32], num_labels: int) -> list[int]:
    """Rows of removed skills that most of the new skill's windows would go to: the skill has come
    back, and what is left of it would speak against it. They are behind the labels' rows and
    nobody's own."""
    winners = np.bincount(head.scores(found).argmax(1), minlength=len(head.bias))
    return [row for row in range(num_labels + 1, len(winners)) if 2 * winners[row] > len(found)]


def _unused_features(head: RouterHead, nobody: int) -> npt.NDArray[np.bool_]:
    """The features that the trained rows do not read [F], if there are some, else all: what the
    trained skills did not need is still in them."""
    unused: npt.NDArray[np.bool_] = head.weight[nobody] == 0
    return unused if unused.any() else ~unused


def router_texts(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """What the router will read of the samples: (prompt, answer so far), with and without the
    wording that the prompts share, and at the sentence starts of the answers."""
    common = CommonText([sample.prompt for sample in samples])
    windows = [(sample.prompt, "") for sample in samples]
    windows += [(bare, "") for bare in map(common.strip, samples) if bare is not None]
    for sample in samples:
        for start in SentenceSplitter().feed(sample.response):
            words = sample.response[start:].split(maxsplit=1)
            windows.append((sample.prompt, sample.response[:start] + words[0]))
    return windows


def fit_row(
    head: RouterHead,
    found: npt.NDArray[np.float32],
    temperature: float,
    read: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.float32], float]:
    """w [F] and b of the new row.

    Args:
        found: features [n, F] of the new skill.
        temperature: the scores are divided by it before the softmax.
        read: the features that the row may read, [F].
    """
    whole = np.concatenate([found, head.features.astype(np.float32)])
    target = np.arange(len(whole)) < len(found)
    offset = -_log_sum_exp(head.scores(whole) / temperature)
    x = whole[:, read].astype(np.float64)
    # The new skill counts as much as an average old one, however many examples it has.
    balance = np.where(target, 1 / len(found), len(set(head.rows.tolist())) / len(head.rows))
    centre = x.mean(0)
    design = np.concatenate([x - centre, np.ones((len(x), 1))], 1)
    ridge = RIDGE * (x - centre).var(0).sum() * np.append(np.ones(x.shape[1]), 0.0)
    row = np.zeros(design.shape[1])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ row + offset, -60, 60)))
        gradient = design.T @ (balance * (p - target)) + ridge * row
        curvature = (design.T * (balance * p * (1 - p))) @ design
        step = np.linalg.solve(curvature + np.diag(ridge + 1e-9), gradient)
        row -= step * min(1.0, 10 / max(1e-12, float(np.abs(design @ step).max())))
        if float(np.abs(design @ step).max()) < 1e-3:
            break
    weight = np.zeros(len(read), np.float32)
    weight[read] = row[:-1] * temperature
    return weight, float(row[-1] * temperature - weight[read] @ centre)


def _log_sum_exp(z: Array) -> Array:
    highest = z.max(1)
    total: Array = highest + np.log(np.exp(z - highest[:, None]).sum(1))
    return total


def _sample_indices(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, drawn evenly."""
    return sorted(random.Random(0).sample(range(count), min(count, most)))
