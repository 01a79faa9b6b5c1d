"""The answers to the requests of one prompt: generated side by side, given out in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from dlp_edge.errors import ContextLengthError
from dlp_edge.runtime.decoding.answer import Answer
from dlp_edge.types import (
    AnsweredRequest,
    Chunk,
    FinishReason,
    Message,
    Reply,
    Sentence,
    Timings,
    Usage,
)

SEPARATOR = "\n\n"  # between two answers; white space belongs to the sentence before it
# Of several reasons for which the requests' answers ended, the first of these is the reply's.
_REASONS: tuple[FinishReason, ...] = ("cancelled", "length", "repetition", "stop")


@dataclass(frozen=True)
class PlannedRequest:
    """A request before it is answered.

    Attributes:
        text, start, end: as in `Request`.
        asked: what the model reads of it: the text, after what all requests need.
        leans_on: index of the request whose answer it needs; None is none.
    """

    text: str
    start: int
    end: int
    asked: str
    leans_on: int | None


class RequestAnswers:
    """The answers to the requests of one prompt.

    Args:
        history: the messages before the prompt.
        prepare: an answer to messages that has not begun.

    Raises:
        ContextLengthError: one of the requests that lean on none is longer than the context.

    Attributes:
        requested_at: as in `Answer`.
    """

    def __init__(
        self,
        requests: Sequence[PlannedRequest],
        history: Sequence[Message],
        prepare: Callable[[Sequence[Message]], Answer],
    ) -> None:
        self.requested_at = 0.0
        self._requests = requests
        self._prepare = prepare
        self._messages: list[list[Message]] = [
            [*history, {"role": "user", "content": request.asked}] for request in requests
        ]
        self._answers: list[Answer | None] = [
            prepare(messages) if request.leans_on is None else None
            for request, messages in zip(requests, self._messages, strict=True)
        ]
        self._waiting = list(range(len(requests)))
        self._held: list[list[Chunk]] = [[] for _ in requests]  # until the answers before are out
        self._current = 0  # the request whose chunks are given out
        self._last: Chunk | None = None  # given out
        self._first_sentence = 0  # of the current request
        self._separated: set[int] = set()  # the requests whose answers a separator follows

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The longest of the prompts that are known."""
        return max((answer.prompt_ids for answer in self._known()), key=len)

    @property
    def limit(self) -> int:
        """The fewest tokens that an answer may have."""
        return min(answer.limit for answer in self._known())

    @property
    def room(self) -> int:
        """Tokens of the context."""
        return self._known()[0].room

    @property
    def done(self) -> bool:
        """Whether all answers are complete and given out."""
        return self._current == len(self)

    def next_answer(self) -> Answer | None:
        """The first answer that has not begun and waits for no other; None if there is none now."""
        for index in tuple(self._waiting):
            before = self._requests[index].leans_on
            if before is None or self._is_done(before):
                self._waiting.remove(index)
                answer = self._answers[index] if before is None else self._follow_up(index, before)
                self._answers[index] = answer
                if answer is not None:
                    if answer is self._known()[0]:
                        answer.requested_at = self.requested_at
                    return answer
        return None

    def hold(self, answer: Answer, chunks: list[Chunk]) -> None:
        """Takes new chunks of one of the answers. Those of one pass are held before any is given
        out: an answer is over with its last chunk."""
        self._held[self._answers.index(answer)] += chunks

    def due(self) -> list[Chunk]:
        """What may be given out: the chunks of the first answer at once, those of another when all
        before it are out."""
        return list(self._due())

    def reply(self) -> Reply:
        """What has been given out so far."""
        each_reply = [answer.reply() if answer is not None else None for answer in self._answers]
        sentences: list[Sentence] = []
        for index, reply in enumerate(each_reply[: self._current + 1]):
            said = reply.sentences if reply is not None else ()
            own = [replace(each, request=index) for each in said]
            if index in self._separated:
                own[-1] = replace(own[-1], text=own[-1].text + SEPARATOR)
            sentences += own
        replies = [reply for reply in each_reply if reply is not None]
        requests = tuple(self._answered(at, reply) for at, reply in enumerate(each_reply))
        reasons = {request.finish_reason for request in requests}
        usage = Usage(
            sum(reply.usage.prompt_tokens for reply in replies),
            sum(reply.usage.completion_tokens for reply in replies),
            sum(reply.usage.cached_tokens for reply in replies),
        )
        return Reply(
            text="".join(sentence.text for sentence in sentences),
            sentences=tuple(sentences),
            usage=usage,
            timings=_side_by_side([reply.timings for reply in replies]),
            finish_reason=next(reason for reason in _REASONS if reason in reasons),
            tokens=tuple(token for reply in replies for token in reply.tokens),
            seed=replies[0].seed,
            requests=requests,
        )

    def _known(self) -> list[Answer]:
        return [answer for answer in self._answers if answer is not None]

    def _answered(self, index: int, reply: Reply | None) -> AnsweredRequest:
        request, answer = self._requests[index], self._answers[index]
        reason: FinishReason = "cancelled" if index in self._waiting else "length"
        shown, decision = "", None
        if answer is not None and reply is not None:
            decision, reason = answer.first_decision, reply.finish_reason
            shown = reply.text if index <= self._current else ""
        return AnsweredRequest(
            request.text, request.start, request.end, decision, request.leans_on, shown, reason
        )

    def _follow_up(self, index: int, before: int) -> Answer | None:
        """The answer in the conversation that the request leans on; None if there is no room."""
        answered = self._answers[before]
        if answered is None:
            return None
        said: Message = {"role": "assistant", "content": answered.reply().text}
        self._messages[index] = [*self._messages[before], said, self._messages[index][-1]]
        try:
            return self._prepare(self._messages[index])
        except ContextLengthError:
            return None

    def _is_done(self, index: int) -> bool:
        answer = self._answers[index]
        return index not in self._waiting and (answer is None or answer.done)

    def _due(self) -> Iterator[Chunk]:
        """The chunks that may be given out, in the order of the requests."""
        while self._current < len(self):
            held, self._held[self._current] = self._held[self._current], []
            for chunk in held:
                yield from self._give_out(chunk)
            if not self._is_done(self._current):
                return
            self._current += 1

    def _give_out(self, chunk: Chunk) -> Iterator[Chunk]:
        last = self._last
        if last is not None and last.request != self._current:
            self._first_sentence = last.sentence + 1
            self._separated.add(last.request)
            yield replace(last, text=SEPARATOR, tokens=())
        sentence = self._first_sentence + chunk.sentence
        self._last = replace(chunk, sentence=sentence, request=self._current)
        yield self._last


def _side_by_side(timings: Sequence[Timings]) -> Timings:
    """The sums; `decode` is that of the answer that took longest, since the others shared its
    passes, and `first_token` that of the first."""
    sums = {
        field.name: sum(getattr(each, field.name) for each in timings) for field in fields(Timings)
    }
    longest = max(each.decode for each in timings)
    return Timings(**{**sums, "decode": longest, "first_token": timings[0].first_token})
