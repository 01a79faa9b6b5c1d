"""Composite-n in one prompt: scores one answer to several questions.

Each question gets a contiguous run of the answer's sentences, in order, so that the total score
is maximal; this holds for every system. A run that names a wrong choice besides the right one
scores 0, so listing all choices does not pay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dlp_edge.evaluation.answers import Answered
from dlp_edge.evaluation.intervals import Interval, mean_of_means, ratio_of_sums
from dlp_edge.evaluation.metrics import mark, named_choices, normalise
from dlp_edge.evaluation.questions import Part, Question
from dlp_edge.evaluation.report.summary import Marked, paired_times
from dlp_edge.evaluation.runner import Answers
from dlp_edge.tasks.samples import Sample


@dataclass(frozen=True)
class JoinedMarks:
    """The scores of an answer to several questions, one for each in order."""

    question: Question
    scores: dict[str, tuple[float, ...]]
    answers: dict[str, Answered]


def part_scores(sentences: Sequence[str], samples: Sequence[Sample]) -> tuple[float, ...]:
    """The score of each question under the best assignment of sentences (see above)."""
    ends = range(len(sentences) + 1)
    # best[i]: (sum, scores) of the questions so far over the first i sentences.
    best: dict[int, tuple[float, tuple[float, ...]]] = {0: (0.0, ())}
    for sample in samples:
        best = {
            end: max(
                (total + score, (*scores, score))
                for start, (total, scores) in best.items()
                if start <= end
                for score in [_run_score("".join(sentences[start:end]), sample)]
            )
            for end in ends
            if any(start <= end for start in best)
        }
    return best[len(sentences)][1]


def _run_score(text: str, sample: Sample) -> float:
    if not text.strip():
        return 0.0
    marks = mark(text, sample)
    if marks.right and named_choices(text, sample.choices) - {normalise(sample.response)}:
        return 0.0
    return marks.score


def mark_joined(questions: Sequence[Question], answers: Answers) -> list[JoinedMarks]:
    """Score all answers to the questions of one joined part."""
    systems = sorted({name for _, name in answers.found})
    marked = []
    for question in questions:
        given = {
            name: answer for name in systems if (answer := answers.of(question, name)) is not None
        }
        samples = [part.sample for part in question.parts]
        scores = {
            name: part_scores([text for text, _ in answer.sentences], samples)
            for name, answer in given.items()
        }
        marked.append(JoinedMarks(question, scores, given))
    return marked


def joined_document(
    marked: Sequence[JoinedMarks], plain: Sequence[Marked], systems: Sequence[str]
) -> dict[str, Any]:
    """The results of one joined part.

    Args:
        plain: the same samples asked alone; the score of their own adapters is the upper bound.
    """
    alone = {item.question.parts[0]: item for item in plain}
    bound = _scores_alone(marked, alone, "single")
    return {
        "questions": len(marked),
        "systems": {name: _system(marked, name) for name in systems if _has(marked, name)},
        "alone": {
            name: _interval(_by_task(marked, _scores_alone(marked, alone, name)))
            for name in systems
        },
        "dlp - single alone": _interval(_difference(marked, "dlp", bound)),
    }


def _has(marked: Sequence[JoinedMarks], name: str) -> bool:
    return bool(marked) and all(name in item.scores for item in marked)


def _system(marked: Sequence[JoinedMarks], name: str) -> dict[str, Any]:
    scores = [item.scores[name] for item in marked]
    times = paired_times([item.answers for item in marked], name, "base")
    return {
        "score": _interval(_by_task(marked, scores)),
        "positions": [sum(place) / len(place) for place in zip(*scores, strict=True)],
        "time_ratio": _interval(ratio_of_sums(times) if times else None),
        "switches": sum(item.answers[name].switches for item in marked) / len(marked),
    }


def _scores_alone(
    marked: Sequence[JoinedMarks], alone: Mapping[Part, Marked], name: str
) -> list[tuple[float, ...]] | None:
    """What a system scores on the same samples asked one by one; None where it has not answered
    all of them."""
    found = []
    for item in marked:
        marks = [alone[part].marks.get(name) for part in item.question.parts]
        if any(each is None for each in marks):
            return None
        found.append(tuple(each.score for each in marks if each is not None))
    return found


def _by_task(
    marked: Sequence[JoinedMarks], scores: Sequence[Sequence[float]] | None
) -> Interval | None:
    """The mean over tasks of the mean score of their parts."""
    if not scores:
        return None
    groups: dict[str, list[float]] = {}
    for item, own in zip(marked, scores, strict=True):
        for part, score in zip(item.question.parts, own, strict=True):
            groups.setdefault(part.task, []).append(score)
    return mean_of_means(list(groups.values()))


def _difference(
    marked: Sequence[JoinedMarks], name: str, others: Sequence[Sequence[float]] | None
) -> Interval | None:
    if others is None or not _has(marked, name):
        return None
    differences = [
        [a - b for a, b in zip(item.scores[name], other, strict=True)]
        for item, other in zip(marked, others, strict=True)
    ]
    return _by_task(marked, differences)


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)
