"""Fit a row of the router's last layer to a new adapter from a few examples.

The graph and the other rows stay unchanged, so the old adapters keep their relative scores. The new
row (w, b) is a logistic regression on the graph's features: the new label against all old rows,
whose log-sum-exp score is the offset. The features that the head stores for every old row are the
negatives. The row reads the pooled embeddings, not the features that the trained rows read, which
separate little beyond the trained labels. The loss is convex; Newton's method converges in a few
steps.
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
KEPT_FEATURES = 48  # feature vectors stored per row: negatives for rows fitted later
RIDGE = 1e-3  # L2 penalty on the weights, relative to the mean loss
MAX_STEPS = 30  # of Newton's method

Array = npt.NDArray[np.float64]


def as_samples(examples: Sequence[str | Mapping[str, object]]) -> list[Sample]:
    """Validate examples: prompts, or {"prompt", "response"?, "choices"?}.

    Raises:
        UsageError: they are not a list, too few or too many.
        RouterError: an example is invalid.
    """
    if isinstance(examples, str) or not isinstance(examples, Sequence):
        raise UsageError("the examples are not a list", "Pass a list of prompts")
    if not MIN_EXAMPLES <= len(examples) <= MAX_EXAMPLES:
        raise UsageError(
            f"{len(examples)} examples were given",
            f"Pass {MIN_EXAMPLES} to {MAX_EXAMPLES}, preferably 20 or more; without examples the "
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
    """The router's last layer with a new row, after those of its labels."""
    features = np.stack([router.features(*text) for text in router_texts(samples)])
    head, temperature = router.head, router.settings.temperature
    head = head.without(_obsolete_rows(head, features, len(router.labels)))
    weight, bias = fit_row(head, features, temperature, _unused_features(head, len(router.labels)))
    kept = features[_sample_indices(len(features), KEPT_FEATURES)]
    return head.with_row(len(router.labels), weight, bias, kept.astype(np.float16))


def _obsolete_rows(
    head: RouterHead, features: npt.NDArray[np.float32], num_labels: int
) -> list[int]:
    """Rows of removed adapters that win most of the new examples.

    Such an adapter has come back, and its old row would compete with the new one. Rows of removed
    adapters follow the labels' rows and the trained out-of-scope row.
    """
    wins = np.bincount(head.scores(features).argmax(1), minlength=len(head.bias))
    return [row for row in range(num_labels + 1, len(wins)) if 2 * wins[row] > len(features)]


def _unused_features(head: RouterHead, out_of_scope: int) -> npt.NDArray[np.bool_]:
    """Mask [F] of the features that the trained rows do not read; all, if there are none.

    Args:
        out_of_scope: index of the trained out-of-scope row.
    """
    unused: npt.NDArray[np.bool_] = head.weight[out_of_scope] == 0
    return unused if unused.any() else ~unused


def router_texts(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """The texts that the router will classify: (prompt, answer so far) of each sample.

    Prompts come with and without the wording that they share, and answers up to the first word of
    each sentence.
    """
    common = CommonText([sample.prompt for sample in samples])
    pairs = [(sample.prompt, "") for sample in samples]
    pairs += [(bare, "") for bare in map(common.strip, samples) if bare is not None]
    for sample in samples:
        for start in SentenceSplitter().feed(sample.response):
            words = sample.response[start:].split(maxsplit=1)
            pairs.append((sample.prompt, sample.response[:start] + words[0]))
    return pairs


def fit_row(
    head: RouterHead,
    features: npt.NDArray[np.float32],
    temperature: float,
    read: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.float32], float]:
    """Fit w [F] and b of the new row.

    Args:
        features: of the new label's examples, [n, F].
        temperature: divides the scores before the softmax.
        read: mask [F] of the features that the row may use.
    """
    everything = np.concatenate([features, head.features.astype(np.float32)])
    target = np.arange(len(everything)) < len(features)
    offset = -_log_sum_exp(head.scores(everything) / temperature)
    x = everything[:, read].astype(np.float64)
    # The new label weighs as much as an average old row, however many examples it has.
    balance = np.where(target, 1 / len(features), len(set(head.rows.tolist())) / len(head.rows))
    centre = x.mean(0)
    design = np.concatenate([x - centre, np.ones((len(x), 1))], 1)
    ridge = RIDGE * (x - centre).var(0).sum() * np.append(np.ones(x.shape[1]), 0.0)
    row = np.zeros(design.shape[1])
    for _ in range(MAX_STEPS):
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
    largest = z.max(1)
    total: Array = largest + np.log(np.exp(z - largest[:, None]).sum(1))
    return total


def _sample_indices(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` indices, drawn uniformly."""
    return sorted(random.Random(0).sample(range(count), min(count, limit)))
