"""The assistant behind the window: a Runtime and its conversation, on a thread of their own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from PySide6.QtCore import QObject, Signal

import dlp_edge

if TYPE_CHECKING:
    from dlp_edge import Chunk, Runtime, Session, Stream

FRAME = 0.03  # seconds between two looks at an answer; faster is not seen, and floods the window
Work = Callable[[threading.Event], None]


class Assistant(QObject):
    """Loads bundles and answers. Every method returns at once; what comes of it are signals.

    Signals:
        loading: (stage, fraction) while a bundle is loaded.
        loaded: (its adapters' names).
        wrote: (list of Chunk, Reply so far): what the answer has grown by.
        answered: (Reply, messages dropped from the conversation so far).
        failed: (cause, remedy) instead of `loaded` or `answered`.
    """

    loading = Signal(str, float)
    loaded = Signal(object)
    wrote = Signal(object, object)
    answered = Signal(object, int)
    failed = Signal(str, str)

    def __init__(self) -> None:
        super().__init__()
        # One thread does everything that takes time, in the order in which it was asked for.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="assistant")
        self._stopped = threading.Event()  # each piece of work has its own
        self._stream: Stream | None = None
        self._runtime: Runtime | None = None
        self._chat: Session | None = None

    def open(self, bundle: Path) -> None:
        """Loads a bundle in place of the one before."""
        self.stop()
        self._start(partial(self._load, bundle))

    def answer(self, begin: Callable[[Session], Stream]) -> None:
        """Answers whatever `begin` says to the conversation, such as `chat.stream(text)`."""
        self._start(partial(self._answer, begin))

    def new_chat(self) -> None:
        """Forgets the conversation."""
        self._start(lambda stopped: self._begin_chat())

    def stop(self) -> None:
        """Ends the answer in the middle of a token, or the loading at its next stage."""
        self._stopped.set()
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        """Stops, waits for the end of it, and gives the memory back."""
        self.stop()
        self._worker.shutdown(cancel_futures=True)
        self._unload()

    def _start(self, work: Work) -> None:
        self._stopped = threading.Event()
        self._worker.submit(self._guard, work, self._stopped)

    def _guard(self, work: Work, stopped: threading.Event) -> None:
        """Everything that goes wrong on the thread is told, never lost."""
        try:
            work(stopped)
        except _AbandonedError:
            self._unload()
        except dlp_edge.DlpEdgeError as error:
            self.failed.emit(error.cause, error.remedy)
        except Exception as error:
            logging.getLogger(__name__).exception("unexpected")
            self.failed.emit(f"{type(error).__name__}: {error}", "Please report this")

    def _load(self, bundle: Path, stopped: threading.Event) -> None:
        def tell(stage: str, fraction: float) -> None:
            if stopped.is_set():
                raise _AbandonedError  # ends the loading: Runtime passes it on
            self.loading.emit(stage, fraction)

        self._unload()  # first: two backbones may not fit into memory
        self._runtime = dlp_edge.Runtime(bundle, on_progress=tell)
        self._begin_chat()
        self.loaded.emit([adapter.name for adapter in self._runtime.adapters])

    def _unload(self) -> None:
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = self._chat = None

    def _begin_chat(self) -> None:
        assert self._runtime is not None  # the window asks for a chat only once a bundle is there
        self._chat = self._runtime.session(overflow="drop_oldest")

    def _answer(self, begin: Callable[[Session], Stream], stopped: threading.Event) -> None:
        assert self._chat is not None
        stream = self._stream = begin(self._chat)
        if stopped.is_set():  # before there was a stream to cancel
            stream.cancel()
        chunks: list[Chunk] = []
        shown = 0.0
        for chunk in stream:
            chunks.append(chunk)
            if perf_counter() - shown >= FRAME:
                self.wrote.emit(chunks, stream.reply)
                chunks, shown = [], perf_counter()
        self.wrote.emit(chunks, stream.reply)
        self.answered.emit(stream.reply, self._chat.dropped)


class _AbandonedError(Exception):
    """Nobody waits for the bundle any more."""
