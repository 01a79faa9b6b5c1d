"""File operations that fail, or at which the process dies: at a chosen one, below one folder.

A point is an operation that changes the disk: opening for writing, making, renaming and removing
files and folders (seen by an audit hook), `fsync`, and the exchange of two folders. Writes
themselves are cut by the kernel (`cut_writes`), in native code too.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dlp_edge.atomic import staging

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PATHS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1}  # event -> path arguments

_watch: tuple[Path, Callable[[str], None]] | None = None  # of all hooks, which cannot be taken off


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is None:
        return
    if event == "open":
        path, _, flags = arguments
        paths = [path] if isinstance(flags, int) and flags & _WRITING else []
    else:
        paths = list(arguments[: _PATHS.get(event, 0)])
    if any(_is_below(path, _watch[0]) for path in paths):
        _tell(f"{event} {paths[-1]}")


def _is_below(path: object, folder: Path) -> bool:
    """Relative names come with the descriptor of a folder, as `shutil.rmtree` uses them."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        return False
    text = os.fsdecode(path)
    return not Path(text).is_absolute() or Path(text).is_relative_to(folder)


def _tell(point: str) -> None:
    global _watch
    if _watch is None:
        return
    watch, _watch = _watch, None  # what is done at a point is no point
    try:
        watch[1](point)
    finally:
        _watch = watch


sys.addaudithook(_hook)


@contextmanager
def watched(folder: Path, at_point: Callable[[str], None]) -> Iterator[None]:
    """Calls `at_point` with a description before every operation below the folder."""
    global _watch

    def fsync(descriptor: int) -> None:
        _tell("fsync")
        real_fsync(descriptor)

    def exchange(first: Path, second: Path) -> bool:
        _tell(f"exchange {second}")
        return real_exchange(first, second)

    real_fsync, real_exchange = os.fsync, staging.exchange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(staging, "exchange", exchange)
        _watch = (folder.resolve(), at_point)
        try:
            yield
        finally:
            _watch = None


def points_of(folder: Path, work: Callable[[], object]) -> list[str]:
    """The points that a piece of work passes."""
    points: list[str] = []
    with watched(folder, points.append):
        work()
    return points


@contextmanager
def failing(folder: Path, at: int, until: int | None = None) -> Iterator[list[str]]:
    """The disk is full at the point number `at` (from 0), or from there to before `until`."""
    points: list[str] = []

    def fail(point: str) -> None:
        points.append(point)
        if at <= len(points) - 1 < (at + 1 if until is None else until):
            raise OSError(errno.ENOSPC, "No space left on device")

    with watched(folder, fail):
        yield points


def killed(folder: Path, at: int, work: Callable[[], object]) -> bool:
    """Runs the work in a forked process that dies before the point number `at`; False if the work
    was done before. Nothing is flushed, no `finally` runs."""

    def die() -> None:
        left = at

        def count(point: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(77)

        with watched(folder, count):
            work()

    return _in_a_fork(die) == 77


def cut_writes(size: int, work: Callable[[], object], kill: bool) -> int | None:
    """Runs the work in a forked process in which no file can grow beyond `size` bytes: a write
    that would gets an error (EFBIG) after a part of it, or kills the process.

    Returns:
        its exit status; None if it was killed.
    """
    import resource

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return _in_a_fork(limited)


def _in_a_fork(work: Callable[[], object]) -> int | None:
    """The exit status: 0, 1 after an exception, the process's own, None where it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            status = getattr(error, "exit_code", 1)
        finally:
            os._exit(status)
    _, result = os.waitpid(pid, 0)
    return os.WEXITSTATUS(result) if os.WIFEXITED(result) else None
