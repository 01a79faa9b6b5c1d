"""The KV caches of sessions, within a budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.session import Session


class SessionCaches:
    """An engine, with a cache of its own, for every session that has spoken.

    Beyond the budget the session that spoke longest ago loses its cache, and reads its
    conversation again when it speaks next. A session that nothing refers to any more is freed.

    Args:
        make: a new engine.
        budget: bytes of all caches together; None is no limit. One session always has room.
    """

    def __init__(self, make: Callable[[], Engine], budget: int | None) -> None:
        self._make = make
        self.budget = budget
        self._engines: weakref.WeakKeyDictionary[Session, Engine] = weakref.WeakKeyDictionary()

    def engine_of(self, session: Session) -> Engine:
        """The session's engine, from now on the one used last."""
        engine = self._engines.pop(session, None) or self._make()
        if self.budget is not None:
            room = self.budget - engine.decoder.cache_bytes
            while self._engines and self._size() > room:
                del self._engines[next(iter(self._engines))]
        self._engines[session] = engine
        return engine

    def copy(self, source: Session, target: Session) -> None:
        """Gives one session the cache of another."""
        if source in self._engines:
            known = self.engine_of(source)  # the target's room is not to cost the source its own
            self.engine_of(target).decoder.copy_cache(known.decoder)

    def _size(self) -> int:
        return sum(engine.decoder.cache_bytes for engine in self._engines.values())
