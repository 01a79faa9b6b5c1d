"""The KV caches of sessions, within a budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from dlp_edge.runtime.decoding.engine import Engine


class SessionCaches:
    """An engine with a KV cache of its own for every session, dropped with the session.

    Beyond the budget the least recently used cache goes; its session prefills again.

    Args:
        make: a new engine.
        budget: bytes of all caches together; None is no limit. One session always fits.
    """

    def __init__(self, make: Callable[[], Engine], budget: int | None) -> None:
        self._make = make
        self.budget = budget
        self._engines: weakref.WeakKeyDictionary[object, Engine] = weakref.WeakKeyDictionary()

    def engine_of(self, session: object) -> Engine:
        """The session's engine, which becomes the most recently used."""
        engine = self._engines.pop(session, None) or self._make()
        if self.budget is not None:
            room = self.budget - engine.decoder.cache_bytes
            while self._engines and self._size() > room:
                del self._engines[next(iter(self._engines))]
        self._engines[session] = engine
        return engine

    def copy(self, source: object, target: object) -> None:
        """Gives one session the cache of another."""
        if source in self._engines:
            known = self.engine_of(source)  # making room for the target must not evict the source
            self.engine_of(target).decoder.copy_cache(known.decoder)

    def _size(self) -> int:
        return sum(engine.decoder.cache_bytes for engine in self._engines.values())
