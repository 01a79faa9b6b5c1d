"""The running batch: answers on the rows of one engine, joining and leaving between two passes.

Rows 0 to n-1 decode, one token each a pass. Rows above them read: a new prompt, or a history again
under the next sentence's adapters (`kv="recompute"`). One row reads at a time, the lowest first, a
chunk between two decode passes, because attention takes several new tokens for one sequence only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from dlp_edge.runtime.batching.job import Job
from dlp_edge.runtime.decoding.answer import Answer, Step
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.engine.decoder import PREFILL_CHUNK, Logits
from dlp_edge.runtime.engine.interrupt import Cancelled
from dlp_edge.runtime.memory import check_address_space
from dlp_edge.types import Chunk

CHUNK_BESIDE = 64  # tokens that are read between two passes of running answers


@dataclass(eq=False)
class Member:
    """An answer on a row.

    Attributes:
        unread: the tokens that are still to be read before it decodes.
        is_new: whether the logits after `unread` give the answer's first token.
    """

    job: Job
    answer: Answer
    row: int
    unread: Sequence[int]
    is_new: bool


class Batch:
    """Answers side by side on one engine.

    What fails in an answer itself (its callback, its router, its numbers) becomes its job's
    `error`. An error that a method raises is the engine's, which cannot be used again.

    Args:
        engine: its sequences are the rows.

    Attributes:
        running: running[i] is on row i.
        reading: members that read, by row.
    """

    def __init__(self, engine: Engine) -> None:
        self.running: list[Member] = []
        self.reading: list[Member] = []
        self._engine = engine

    @property
    def members(self) -> list[Member]:
        return [*self.running, *self.reading]

    def members_of(self, job: Job) -> list[Member]:
        return [member for member in self.members if member.job is job]

    @property
    def takes_one(self) -> bool:
        """Whether a new answer can begin now: there is a row, and no other new prompt is read."""
        newcomer = any(member.is_new for member in self.reading)
        return not newcomer and self._top < len(self._engine.decoder.lengths)

    @property
    def _top(self) -> int:
        """The first row above all that are in use."""
        return self.reading[-1].row + 1 if self.reading else len(self.running)

    def begin(self, job: Job, answer: Answer) -> None:
        """Routes and fuses a new answer, and takes over what a cache has of its prompt."""
        check_address_space()
        with job.mutex:
            try:
                fusion = answer.begin()
            except BaseException as error:
                job.error = error
                return
        row, started = self._top, perf_counter()
        self._engine.fuse(fusion, row)
        fused = perf_counter()
        home = job.home().decoder if job.keeps else None
        reused = self._engine.take_over(answer.prompt_ids, row, home)
        answer.record(switch=fused - started, prefill=perf_counter() - fused, reused=reused)
        self.reading.append(Member(job, answer, row, answer.prompt_ids[reused:], is_new=True))

    def adopt(self, job: Job, answer: Answer) -> None:
        """Goes on with an answer that was begun on its job's home engine."""
        member, home = Member(job, answer, self._top, (), is_new=False), job.home().decoder
        before = home.labels[0]
        self._engine.decoder.copy_cache(home, 0, member.row)
        self._engine.fuse(answer.fusion, member.row)
        if answer.kv == "recompute" and before != self._engine.decoder.labels[member.row]:
            member.unread = self._history(member)
            self._engine.decoder.truncate(0, member.row)
        self.reading.append(member)

    def read(self) -> list[tuple[Member, list[Chunk]]]:
        """Reads one chunk for the lowest row that reads, which then decodes if that was all."""
        if not self.reading:
            return []
        member, decoder = self.reading[0], self._engine.decoder
        logits: Logits | None = None
        if member.unread:
            size = CHUNK_BESIDE if self.running else PREFILL_CHUNK
            chunk, rest = member.unread[:size], member.unread[size:]
            started = perf_counter()
            try:
                logits = decoder.prefill(chunk, member.row, member.job.interrupt)
            except Cancelled:
                return []
            kind = "prefill" if member.is_new else "recompute"
            member.answer.record(**{kind: perf_counter() - started})
            member.unread = rest
            if rest:
                return []
        if member.is_new:
            self._engine.remember(member.row)
        step = self._take(member, logits) if member.is_new and logits is not None else None
        member.is_new = False
        self._promote(member)
        if step is None:
            return []
        self._follow(member, step)
        return [(member, step.chunks)]

    def step(self) -> list[tuple[Member, list[Chunk]]]:
        """One more token for each running answer; the chunks of each. An answer that is done
        stays on its row until `leave`."""
        members = list(self.running)
        if not members:
            return []
        interrupt = members[0].job.interrupt if len(members) == 1 else None
        started = perf_counter()
        try:
            tokens = [member.answer.tokens[-1] for member in members]
            logits = self._engine.decoder.step(tokens, interrupt)
        except Cancelled:
            return []
        seconds = perf_counter() - started
        for member in members:
            member.answer.record(decode=seconds, decode_steps=1)
        # All rows are sampled before anything is read: that overwrites the logits.
        steps = [self._take(member, row) for member, row in zip(members, logits, strict=True)]
        for member, step in zip(reversed(members), reversed(steps), strict=True):
            self._follow(member, step)
        return [(member, step.chunks) for member, step in zip(members, steps, strict=True)]

    def leave(self, member: Member) -> None:
        """Frees the row of an answer; the last running one moves into its place, so that no pass
        works in vain."""
        engine, job = self._engine, member.job
        if member in self.reading:
            self.reading.remove(member)
        if job.error is not None:
            engine.decoder.truncate(0, member.row)  # it may hold what went wrong
        else:
            engine.remember(member.row)
            if job.keeps:
                job.home().decoder.copy_cache(engine.decoder, member.row)
        if member in self.running:
            self._close_gap(member)

    def _take(self, member: Member, logits: Logits) -> Step:
        with member.job.mutex:
            if member.job.abandoned:
                return Step([])
            try:
                return member.answer.take(logits)
            except BaseException as error:
                member.job.error = error
                return Step([])

    def _follow(self, member: Member, step: Step) -> None:
        """Fuses what writes the next sentence; the history is read again where the policy says."""
        if member.answer.done or step.fusion is None:
            return
        if member.answer.kv == "recompute":
            self._close_gap(member)
            member.row = len(self.running)  # its own cache is not needed any more
            member.unread = self._history(member)
            self._engine.decoder.truncate(0, member.row)
            self.reading.insert(0, member)
        started = perf_counter()
        self._engine.fuse(step.fusion, member.row)
        member.answer.record(switch=perf_counter() - started)

    def _promote(self, member: Member) -> None:
        """Moves the lowest reading row to the rows that decode: the first above them is free."""
        self.reading.remove(member)
        if member.row != len(self.running):
            self._move(member, len(self.running))
        self.running.append(member)

    def _close_gap(self, member: Member) -> None:
        last = self.running.pop()
        if last is not member:
            self.running[member.row] = last
            self._move(last, member.row)

    def _move(self, member: Member, row: int) -> None:
        engine = self._engine
        engine.decoder.move(member.row, row)
        engine.decoder.set_fusion(engine.fuser.move(member.row, row))
        member.row = row

    @staticmethod
    def _history(member: Member) -> list[int]:
        """All tokens of an answer that a cache holds before its next pass."""
        return [*member.answer.prompt_ids, *member.answer.tokens[:-1]]
