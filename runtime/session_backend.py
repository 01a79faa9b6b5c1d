"""What a session needs of its Runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from dlp_edge.runtime.batching.job import Job
from dlp_edge.runtime.batching.scheduler import Scheduler
from dlp_edge.runtime.decoding.answer import Answer
from dlp_edge.runtime.decoding.request_answers import RequestAnswers
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.engine.ort_errors import ANSWERING, memory_for
from dlp_edge.runtime.loaded_bundle import LoadedBundle
from dlp_edge.runtime.options import GenerateOptions
from dlp_edge.runtime.request import RequestOptions, parse_options
from dlp_edge.runtime.session_cache_file import HEADER_BYTES, restore, to_bytes
from dlp_edge.runtime.stream import OpenStreams, Stream
from dlp_edge.types import Message, Reply
from dlp_edge.untrusted.regular_file import read_followed

T = TypeVar("T")
_log = logging.getLogger(__name__)

# (session, on_end) -> the stream of a prepared answer, on the session's cache.
StreamFactory = Callable[[object, Callable[[Reply], None]], Stream]


@dataclass(frozen=True)
class SessionBackend:
    """What a session needs of its Runtime; the Runtime keeps no reference to it.

    Attributes:
        open: the bundle as it is now; raises once the Runtime is closed.
        scheduler, streams, closing: the Runtime's.
    """

    open: Callable[[], LoadedBundle]
    scheduler: Scheduler
    streams: OpenStreams
    closing: Interrupt

    def parse_options(self, options: GenerateOptions) -> RequestOptions:
        """A request's options, checked."""
        return parse_options(options, self.open().manifest)

    def prepare_turn(
        self, messages: Sequence[Message], options: RequestOptions
    ) -> tuple[Answer | RequestAnswers, StreamFactory]:
        """An answer that has not begun, and what starts it on a session's cache."""
        loaded = self.open()
        answer = loaded.prepare_stream(messages, options)

        def start(session: object, on_end: Callable[[Reply], None]) -> Stream:
            job = Job(answer, loaded, partial(loaded.caches.engine_of, session), keeps=True)
            return self.streams.add(Stream(job, self.scheduler, options.wait, on_end))

        return answer, start

    def copy_cache(self, source: object, target: object) -> None:
        """Gives one session what another's cache holds."""
        self._use_caches(lambda loaded: loaded.caches.copy(source, target))

    def cache_of(self, session: object) -> bytes | None:
        """What a session's cache holds, as a file's content; None if that is nothing."""

        def read(loaded: LoadedBundle) -> bytes | None:
            return to_bytes(loaded.caches.engine_of(session).decoder, loaded.manifest)

        return self._use_caches(read)

    def restore_cache(self, session: object, path: Path) -> None:
        """Fills a session's cache from a file; one that does not fit is left out."""

        def fill(loaded: LoadedBundle) -> None:
            decoder = loaded.caches.engine_of(session).decoder
            try:
                data = read_followed(path, decoder.cache_bytes + HEADER_BYTES)
                restore(data, decoder, loaded.manifest)
            except (OSError, ValueError) as error:
                _log.warning("%s is not used: %s", path, error)

        self._use_caches(fill)

    @memory_for(ANSWERING)
    def _use_caches(self, use: Callable[[LoadedBundle], T]) -> T | None:
        loaded = self.open()
        if not self.scheduler.acquire(self.closing.is_set):
            return None
        try:
            return use(loaded)
        finally:
            self.scheduler.release()
