"""File operations as on Windows: what is open can be neither renamed nor removed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from dlp_edge.atomic import staging

SHARING_VIOLATION = 32


class HeldOpenError(PermissionError):
    """What Python raises on Windows for a file that is open."""

    winerror = SHARING_VIOLATION


def open_files(path: Path) -> list[Path]:
    """The files at or below a path that this process has open."""
    place = path.absolute()
    held = (Path(file.path) for file in psutil.Process().open_files())
    return [file for file in held if place == file or place in file.parents]


@contextmanager
def windows_files() -> Iterator[None]:
    """Renames and removals fail for open files, folders are not replaced by renames, and two
    folders cannot be exchanged."""

    def guarded(real: Callable[..., None], moves: bool) -> Callable[..., None]:
        def call(*paths: Any, **options: Any) -> None:
            for path in paths[: 1 + moves]:
                if open_files(Path(path)):
                    raise HeldOpenError(errno.EACCES, "the file is used by another process")
            if moves and Path(paths[1]).is_dir():
                raise PermissionError(errno.EACCES, "access is denied")
            real(*paths, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, moves in {
            "rename": True,
            "replace": True,
            "unlink": False,
            "remove": False,
        }.items():
            patch.setattr(os, name, guarded(getattr(os, name), moves))
        patch.setattr(shutil, "_use_fd_functions", False)
        patch.setattr(staging, "exchange", lambda first, second: False)
        yield
