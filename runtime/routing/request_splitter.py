"""The request splitter: finds the requests of a prompt, each to be answered as if asked alone.

A network scores every token of the prompt (`dlp_edge.models.splitter.network`): how well each task,
other text, glue ("and then", list marks) and an introduction fit it, and whether a request or glue
starts at it. Dynamic programming finds the best segmentation (Viterbi, over the tokens that may
start something).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dlp_edge.errors import RouterError
from dlp_edge.native_calls import native_calls
from dlp_edge.runtime.engine.ort_errors import first_line, is_out_of_memory
from dlp_edge.runtime.routing.small_session import open_small
from dlp_edge.runtime.routing.splitter_input import SplitterInput, splitter_input

MAX_CHARACTERS = 20_000  # a longer prompt is left whole: it is a document
# Scores of a token besides those of the tasks: out-of-scope, glue, introduction; start of a
# request, start of glue, whether the request leans on an earlier one.
SEGMENT_KINDS, TOKEN_SCORES = 3, 3
LEAST_START = -4.0  # tokens with lower start scores are passed over
LONGEST_MARK = 3  # characters
LEAST_LEANING = 1.0  # log-odds, the mean over a request's tokens
_REFERENCE = re.compile(
    r"\b(?:it|its|that|this|them|they|these|those|both|same|ones?|again|more|too|other|last|above"
    r"|previous|answers?|results?|output|about|so|why|your?|now|without|end|but)\b",
    re.IGNORECASE,
)
# The end of a sentence that began before.
_REST = re.compile(r"[^\n.?!]*[^\W\d_]{2}[^\n.?!]*[.?!]+(?=\s|$)")
# "Say that like a pirate", "then put it into JSON", "double it": no more words than these.
_ORDER = re.compile(
    r"(?:(?:and|then|now|next|also|please|(?:can|could|would) you)[ ,]+)*"
    r"(?!(?:is|are|was|were|do|does|did|can|could|would|will|what|who|where|when|how|if|i)\b)"
    r"\w+ (?:me |us |all of )?(?:it|that|this|them|these|those|both)"
    r"(?: (?:like|in|into|as|to|for|again|too|with|by|more|please|\w+er)\b[^:\n]{0,60})?[.?!]*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class RequestSpan:
    """A request: text[start:end].

    Attributes:
        leans: whether it needs the request before, and its answer.
    """

    start: int
    end: int
    leans: bool = False


@dataclass(frozen=True)
class Split:
    """The requests of a prompt, in order, and the text before them that all of them need."""

    requests: tuple[RequestSpan, ...]
    introduction: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Segment:
    kind: int
    first: int  # token
    stop: int


class RequestSplitter:
    """A trained request splitter.

    Args:
        model: the bytes of request_splitter.onnx: ids, gaps [1, L] int64 -> scores [1, L, S].
        tokenizer: the router's.

    Raises:
        RouterError: the graph does not load, or does not fit the tokenizer.
        MemoryError: not enough memory.
    """

    def __init__(self, model: bytes, tokenizer: Tokenizer) -> None:
        try:
            self._session = open_small(model)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise _as_router_error(error) from error
        self._tokenizer = tokenizer
        self.split("What is this? And that?")  # fails early if graph and tokenizer do not match

    def split(self, text: str) -> Split:
        """The requests of a prompt; the whole prompt if it is one.

        Raises:
            RouterError: the graph fails to run, or its output is not finite.
            MemoryError: not enough memory.
        """
        if len(text) > MAX_CHARACTERS:
            return _whole(text)
        tokens = splitter_input(text, self._tokenizer.encode(text, add_special_tokens=False))
        if len(tokens.ids) < 2:
            return _whole(text)
        return requests_of(text, tokens, self._scores(tokens))

    def _scores(self, tokens: SplitterInput) -> npt.NDArray[np.float32]:
        """[L, S]"""
        inputs = {"ids": tokens.ids[None], "gaps": tokens.gaps[None]}
        try:
            with native_calls:
                (output,) = self._session.run(["scores"], inputs)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise _as_router_error(error) from error
        scores = np.asarray(output, np.float32)
        if scores.shape[:2] != (1, len(tokens.ids)) or not np.isfinite(scores).all():
            raise RouterError(
                "the request splitter's output is not finite", "Train the router again"
            )
        row: npt.NDArray[np.float32] = scores[0]
        return row


def requests_of(text: str, tokens: SplitterInput, scores: npt.NDArray[np.float32]) -> Split:
    """The requests of a text, given the network's scores [L, S] for its tokens.

    Neighbours that no task is for stay one request: the base model answers both, and most of them
    are parts of one document.
    """
    other = scores.shape[1] - TOKEN_SCORES - SEGMENT_KINDS
    glue = other + 1
    introduction: tuple[int, int] | None = None
    requests: list[RequestSpan] = []
    was_other = False  # the request before
    for segment in _segments(scores):
        start, end = int(tokens.starts[segment.first]), int(tokens.ends[segment.stop - 1])
        if segment.kind == glue:
            if requests:
                requests[-1] = _with_rest(text, requests[-1], start, end)
            continue
        if _is_empty(text[start:end]):
            continue
        if segment.kind > glue:
            introduction = introduction or (start, end)
            continue
        log_odds = float(scores[segment.first : segment.stop, -1].mean())
        leans = bool(requests) and _leans(text[start:end], log_odds)
        if was_other and segment.kind == other and not leans:
            requests[-1] = replace(requests[-1], end=end)
        else:
            requests.append(RequestSpan(start, end, leans))
        was_other = segment.kind == other
    if len(requests) < 2:
        return _whole(text)
    # What looks like glue at the end may be a part of the last request; thanks do no harm.
    requests[-1] = replace(requests[-1], end=len(text.rstrip()))
    return Split(tuple(requests), introduction)


def _with_rest(text: str, request: RequestSpan, start: int, end: int) -> RequestSpan:
    """The request, up to the end of its sentence if glue at text[start:end] begins within one:
    "is it cold in Oslo. and then" is joined by "and then", not by "Oslo. and then"."""
    rest = _REST.match(text, start, end)
    if rest is None or not text[request.end - 1].isalnum() or "\n" in text[request.end : start]:
        return request
    return replace(request, end=rest.end())


def _leans(request: str, log_odds: float) -> bool:
    """Whether a request needs the one before: the network says so of one that refers to
    something, or it is a short order about "it" (English; other languages are left to the
    network's examples, which are English, too)."""
    if _ORDER.fullmatch(request.strip()):
        return True
    return log_odds > LEAST_LEANING and _REFERENCE.search(request) is not None


def _is_empty(text: str) -> bool:
    """Whether this is a bullet without a request. (Some skills read brackets alone.)"""
    return len(text) <= LONGEST_MARK and not any(map(str.isalnum, text))


def _whole(text: str) -> Split:
    return Split((RequestSpan(0, len(text)),))


def _segments(scores: npt.NDArray[np.float32]) -> Iterator[_Segment]:
    """The best segmentation of L tokens, from the first to the last.

    Args:
        scores: [L, K + TOKEN_SCORES], of K kinds of segment.
    """
    kinds = scores.shape[1] - TOKEN_SCORES
    glue = kinds - SEGMENT_KINDS + 1
    starts, glue_starts = scores[:, kinds], scores[:, kinds + 1]
    places = np.flatnonzero(np.maximum(starts, glue_starts) > LEAST_START)
    places = np.union1d(places, [0])
    fits = np.add.reduceat(scores[:, :kinds].astype(np.float64), places, axis=0)
    best = fits[0]
    came_from = np.tile(np.arange(kinds), (len(places), 1))  # the kind at the place before
    entered = np.zeros((len(places), kinds), bool)
    for at in range(1, len(places)):
        source = int(best.argmax())
        enter = np.full(kinds, best[source] + starts[places[at]])
        sources = np.full(kinds, source)
        request = source
        if source == glue:  # glue does not follow glue
            without = best.copy()
            without[glue] = -np.inf
            request = int(without.argmax())
        enter[glue], sources[glue] = best[request] + glue_starts[places[at]], request
        entered[at] = enter > best
        came_from[at, entered[at]] = sources[entered[at]]
        best = np.maximum(enter, best) + fits[at]
    kind, stop = int(best.argmax()), len(scores)
    found: list[_Segment] = []
    for at in range(len(places) - 1, -1, -1):
        if at == 0 or entered[at, kind]:
            found.append(_Segment(kind, int(places[at]), stop))
            stop = int(places[at])
        kind = int(came_from[at, kind])
    return reversed(found)


def _as_router_error(error: Exception) -> Exception:
    if is_out_of_memory(error):
        return MemoryError(first_line(error))
    return RouterError(
        f"the request splitter's model failed ({error})",
        "It is damaged or does not match its tokenizer: export the bundle again",
    )
