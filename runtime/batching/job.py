"""A request as the scheduler sees it: what it reads next, and the chunks that wait for a reader."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator

from dlp_edge.runtime.decoding.answer import Answer
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.decoding.loop import answer_steps
from dlp_edge.runtime.decoding.request_answers import RequestAnswers
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.loaded_bundle import MAX_SIDE_BY_SIDE, LoadedBundle
from dlp_edge.types import Chunk, Reply


class Job:
    """A request on its way through the scheduler.

    Args:
        answer: what is generated; several answers each take a row of the batch.
        loaded: the edition of the bundle that it was prepared with.
        home: gives the engine that answers it while it is alone: the session's, or the bundle's.
        keeps: whether `home` keeps the cache for the session's next turn.

    Attributes:
        interrupt: cancels it.
        mutex: held while the answer changes, so that `reply` sees a whole one. Never over a pass.
        begun: whether it is in the engine's hands, and no longer in the queue.
        chunks: generated, and not yet taken by the consumer.
        error: what ended it, for the consumer to raise.
        done: whether nothing follows the chunks.
        abandoned: whether the consumer is gone, and the answer must not change any more.
    """

    def __init__(
        self,
        answer: Answer | RequestAnswers,
        loaded: LoadedBundle,
        home: Callable[[], Engine],
        keeps: bool = False,
    ) -> None:
        self.answer = answer
        self._source: tuple[LoadedBundle, Callable[[], Engine]] | None = (loaded, home)
        self.keeps = keeps and self.is_single
        self.interrupt = Interrupt()
        self.mutex = threading.RLock()
        self.begun = False
        self.chunks: deque[Chunk] = deque()
        self.error: BaseException | None = None
        self.done = False
        self.abandoned = False
        self.consumer: int | None = None  # the thread that takes the chunks
        self._steps: Generator[list[Chunk], None, None] | None = None
        self._taken = False
        self._held: list[Chunk] = []

    @property
    def loaded(self) -> LoadedBundle:
        """The edition of the bundle that it was prepared with."""
        assert self._source is not None, "the request has ended"
        return self._source[0]

    def home(self) -> Engine:
        """The engine that answers it while it is alone."""
        assert self._source is not None, "the request has ended"
        return self._source[1]()

    def let_go(self) -> None:
        """Forgets the bundle and its engines: the request has ended, its reply lives on."""
        self._source = self._steps = None

    @property
    def rows(self) -> int:
        """The most rows of a batch that it takes."""
        return 1 if isinstance(self.answer, Answer) else min(MAX_SIDE_BY_SIDE, len(self.answer))

    @property
    def is_single(self) -> bool:
        """Whether it is one answer, which can be generated without a batch."""
        return isinstance(self.answer, Answer)

    def reply(self) -> Reply:
        """The answer so far."""
        with self.mutex:
            return self.answer.reply()

    @property
    def is_at_home(self) -> bool:
        """Whether it is being generated on its home engine."""
        return self._steps is not None

    def step_alone(self) -> list[Chunk] | None:
        """The chunks of the next step of a single answer on its home engine; None at the end."""
        if self._steps is None:
            answer = self.next_answer()
            if answer is None:
                return None
            self._steps = answer_steps(self.home(), answer, self.interrupt)
        chunks = next(self._steps, None)
        if chunks is None:
            self._steps = None
        return chunks

    def leave_home(self) -> None:
        """Ends the generation on the home engine, between two steps. Its cache then holds all of
        the answer but the newest token."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def next_answer(self) -> Answer | None:
        """The next answer that can begin; None if there is none now."""
        if isinstance(self.answer, RequestAnswers):
            return self.answer.next_answer()
        if self._taken:
            return None
        self._taken = True
        return self.answer

    def hold(self, answer: Answer, chunks: list[Chunk]) -> None:
        """Takes the chunks that a pass gave one of the answers."""
        if isinstance(self.answer, RequestAnswers):
            self.answer.hold(answer, chunks)
        else:
            self._held += chunks

    def due(self) -> list[Chunk]:
        """What the consumer gets of the chunks that are held."""
        if isinstance(self.answer, RequestAnswers):
            return self.answer.due()
        held, self._held = self._held, []
        return held
