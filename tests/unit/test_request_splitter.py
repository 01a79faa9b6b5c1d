"""Taking a prompt apart: the best segmentation, and what becomes a request."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from dlp_edge.runtime.routing import request_splitter
from dlp_edge.runtime.routing.request_splitter import RequestSpan, Split, requests_of
from dlp_edge.runtime.routing.splitter_input import SplitterInput, splitter_input

# One task, out-of-scope, glue, introduction; start, glue start, leaning.
TASK, OTHER, GLUE, INTRODUCTION, START, GLUE_START, LEANS = range(7)
KINDS = 4


def tokens_of(text: str) -> SplitterInput:
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return splitter_input(text, tokenizer.encode(text, add_special_tokens=False))


def split(text: str, kinds: str, leaning: str = "") -> Split:
    """The split if scores say of each word: t a task, T its start, o none of
    the tasks, O its start, g glue, i introduction."""
    tokens = tokens_of(text)
    assert len(tokens.ids) == len(kinds)
    scores = np.full((len(kinds), 7), -9.0, np.float32)
    for row, kind in zip(scores, kinds, strict=True):
        row[{"t": TASK, "g": GLUE, "i": INTRODUCTION, "o": OTHER}[kind.lower()]] = 9.0
        row[START] = 5.0 if kind in "TO" else -5.0
        row[GLUE_START] = 5.0 if kind == "g" else -5.0
    for row, leans in zip(scores, leaning, strict=False):
        row[LEANS] = 9.0 if leans == "l" else -9.0
    return requests_of(text, tokens, scores)


def test_requests_without_what_joins_them() -> None:
    text = "Mail Leo. And then sum 1 2"
    found = split(text, "TttggTtt")
    assert [text[each.start : each.end] for each in found.requests] == ["Mail Leo.", "sum 1 2"]
    assert found.introduction is None


def test_one_request_is_the_whole_prompt() -> None:
    assert split("  hello there  ", "gT").requests == (RequestSpan(0, 15),)


def test_the_end_of_a_prompt_belongs_to_its_last_request() -> None:
    text = "mail Leo\nsum 3 + 4 "
    found = split(text, "TtTtgg")
    assert text[found.requests[1].start : found.requests[1].end] == "sum 3 + 4"


def test_glue_within_a_sentence_begins_after_it() -> None:
    text = "is it cold in Oslo. and then sum 3"
    first, second = split(text, "TtttggggTt").requests
    assert text[first.start : first.end] == "is it cold in Oslo."
    assert text[second.start : second.end] == "sum 3"


@pytest.mark.parametrize("glue", ["2.", "\nNext question."])
def test_list_marks_and_lines_end_no_sentence(glue: str) -> None:
    text = f"sum 3 {glue} mail Leo"
    kinds = "Tt" + "g" * (len(tokens_of(text).ids) - 4) + "Tt"
    first, _ = split(text, kinds).requests
    assert text[first.start : first.end] == "sum 3"


def test_neighbours_that_no_task_is_for_are_one_request() -> None:
    text = "who are you and what is rain. sum 3"
    found = split(text, "OoogOooo" + "Tt")
    asked = [text[each.start : each.end] for each in found.requests]
    assert asked == ["who are you and what is rain.", "sum 3"]
    assert len(split("what is rain say that twice", "OooOoo", "...lll").requests) == 2


def test_an_introduction_is_no_request() -> None:
    text = "table books mail Leo sum 3"
    found = split(text, "iiTtTt")
    assert found.introduction == (0, 11)
    assert [text[each.start : each.end] for each in found.requests] == ["mail Leo", "sum 3"]


def test_an_empty_bullet_is_no_request_and_brackets_are_one() -> None:
    assert len(split("mail Leo\n-\nsum 3", "TtTTt").requests) == 2
    assert len(split("mail Leo\n([ ])", "TtTt").requests) == 2


def test_what_leans() -> None:
    found = split("sum 3 say that", "TtTt", "..ll")
    assert [each.leans for each in found.requests] == [False, True]


def test_the_first_request_leans_on_nothing() -> None:
    assert not split("say that sum 3", "TtTt", "ll..").requests[0].leans


@given(
    st.integers(1, 5).flatmap(
        lambda length: arrays(np.float32, (length, 7), elements=st.integers(-3, 3))
    )
)
def test_the_best_segmentation_is_found(scores: npt.NDArray[np.float32]) -> None:
    found = list(request_splitter._segments(scores))
    assert found[0].first == 0
    assert found[-1].stop == len(scores)
    assert all(a.stop == b.first for a, b in itertools.pairwise(found))
    best = max(
        _score(scores, kinds, starts)
        for kinds in itertools.product(range(KINDS), repeat=len(scores))
        for starts in itertools.product((False, True), repeat=len(scores) - 1)
    )
    assert _score_of(scores, found) == pytest.approx(best)


def _score_of(scores: npt.NDArray[np.float32], segments: list[request_splitter._Segment]) -> float:
    kinds = [s.kind for s in segments for _ in range(s.first, s.stop)]
    firsts = {segment.first for segment in segments}
    return _score(scores, tuple(kinds), tuple(at in firsts for at in range(1, len(scores))))


def _score(
    scores: npt.NDArray[np.float32], kinds: tuple[int, ...], starts: tuple[bool, ...]
) -> float:
    """Of a path; minus infinity for one that the chain does not have."""
    total = float(scores[0, kinds[0]])
    for at in range(1, len(kinds)):
        same = kinds[at] == kinds[at - 1]
        if (not same and not starts[at - 1]) or (same and kinds[at] == GLUE and starts[at - 1]):
            return -np.inf
        if starts[at - 1]:
            total += float(scores[at, GLUE_START if kinds[at] == GLUE else START])
        total += float(scores[at, kinds[at]])
    return total


@given(st.text(alphabet="ab é\n\t.中", max_size=40))
def test_tokens_lie_where_their_words_are(text: str) -> None:
    tokens = tokens_of(text)
    words = [text[start:end] for start, end in zip(tokens.starts, tokens.ends, strict=True)]
    assert all(word and word == word.strip() for word in words)
    assert "".join(words) == "".join(text.split())


def test_gaps() -> None:
    assert tokens_of("a b\nc\n\nd.").gaps.tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    "request_",
    [
        "say that like a pirate",
        "Then put it into JSON.",
        "make it shorter",
        "double them",
        "send me that",
    ],
)
def test_orders_about_what_came_before_lean(request_: str) -> None:
    assert request_splitter._leans(request_, -9.0)


@pytest.mark.parametrize(
    "request_",
    [
        "What is 3 plus 4?",
        "Mail Leo that lunch is at 12",
        "Is it raining?",
        "Say it like a pirate: Hi you",
    ],
)
def test_requests_that_only_look_so_do_not(request_: str) -> None:
    assert not request_splitter._leans(request_, -9.0)


def test_what_refers_to_nothing_leans_on_nothing() -> None:
    assert not request_splitter._leans("What is 3 plus 4?", 9.0)
    assert request_splitter._leans("And the same for Anna", 9.0)
