"""Steps a batch: who joins it, who leaves it, and who gets which chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dlp_edge.runtime.batching.batch import Batch, Member
from dlp_edge.runtime.batching.job import Job
from dlp_edge.runtime.decoding.answer import Answer
from dlp_edge.types import Chunk


class BatchRunner:
    """The batch of the engine thread, made when it is needed.

    Args:
        rows: the most answers side by side.
        give: called with a request, new chunks for its consumer, and whether nothing follows them.
    """

    def __init__(self, rows: int, give: Callable[[Job, list[Chunk], bool], None]) -> None:
        self._rows = rows
        self._give = give
        self._batch: Batch | None = None
        self._edition: object = None  # of the bundle, whose engine the batch has

    @property
    def members(self) -> list[Member]:
        """The answers under way."""
        return [] if self._batch is None else self._batch.members

    def drop(self) -> None:
        """Gives the batch's memory back, whatever it holds."""
        self._batch = self._edition = None

    def turn(self, jobs: Sequence[Job]) -> None:
        """Lets answers in and out, reads a chunk of a prompt, and decodes a token of each."""
        batch = self._batch_for(jobs)
        jobs = [job for job in jobs if job.loaded is self._edition]
        self._adopt(batch, jobs)
        self._end_cancelled(batch, jobs)
        self._begin_one(batch, jobs)
        for generate in (batch.read, batch.step):
            self._deliver(batch, generate())
            self._end_failed(batch, jobs)

    def _batch_for(self, jobs: Sequence[Job]) -> Batch:
        """The batch, of the edition of the first request if it is empty."""
        batch = self._batch
        if batch is None or (not batch.members and jobs and jobs[0].loaded is not self._edition):
            self._batch = None  # before another one takes its memory
            self._batch = batch = Batch(jobs[0].loaded.pool(self._rows))
            self._edition = jobs[0].loaded
        return batch

    def _adopt(self, batch: Batch, jobs: Sequence[Job]) -> None:
        """Takes over the request that was alone."""
        for job in jobs:
            if job.is_at_home:
                job.leave_home()
                if isinstance(job.answer, Answer) and not job.answer.done:
                    batch.adopt(job, job.answer)
                else:
                    self._give(job, [], True)

    def _begin_one(self, batch: Batch, jobs: Sequence[Job]) -> None:
        """Begins the next answer, if there is room: of the request that has the fewest under way,
        of those of the one that came first."""
        if not batch.takes_one:
            return
        used = {job: sum(member.job is job for member in batch.members) for job in jobs}
        for job in sorted(jobs, key=lambda job: used[job]):
            if job.done or job.interrupt.is_set() or used[job] >= job.rows:
                continue
            job.begun = True
            with job.mutex:
                answer = job.next_answer()
            if answer is not None:
                batch.begin(job, answer)
                self._end_failed(batch, [job])
                return
            if not used[job]:  # what was left of a request of several answers has no room
                self._give(job, job.due(), True)

    def _deliver(self, batch: Batch, generated: Sequence[tuple[Member, list[Chunk]]]) -> None:
        for member, _ in reversed(generated):  # the last row first, so that few rows move
            if member.answer.done:
                batch.leave(member)
        for member, chunks in generated:
            if not member.job.abandoned:
                with member.job.mutex:
                    member.job.hold(member.answer, chunks)
        for job in {member.job: None for member, _ in generated}:
            if not job.abandoned and job.error is None:
                with job.mutex:
                    given, done = job.due(), job.answer.done
                self._give(job, given, done)

    def _end_cancelled(self, batch: Batch, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if not job.begun or not job.interrupt.is_set():
                continue
            members, given = batch.members_of(job), list[Chunk]()
            if not job.abandoned:
                with job.mutex:
                    for member in members:
                        job.hold(member.answer, member.answer.finish())
                    given = job.due()
            for member in members:
                batch.leave(member)
            self._give(job, given, True)

    def _end_failed(self, batch: Batch, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.error is not None and not job.done:
                for member in batch.members_of(job):
                    batch.leave(member)
                self._give(job, [], True)
