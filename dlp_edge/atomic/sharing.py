"""Files that another program holds open.

Windows refuses to rename, remove or open such a file, and virus scanners and indexers open
whatever was just written, for a moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

PATIENCE = 2.0  # seconds
_PAUSE = 0.02
_HELD_OPEN = (5, 32, 33)  # winerror.h: ACCESS_DENIED, SHARING_VIOLATION, LOCK_VIOLATION
T = TypeVar("T")


def patiently(action: Callable[[], T]) -> T:
    """Calls `action`, again for PATIENCE seconds while Windows says that a file is held open."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return action()
        except OSError as error:
            held = getattr(error, "winerror", None) in _HELD_OPEN
            if not held or time.monotonic() >= end:
                raise
        time.sleep(_PAUSE)


def move(source: Path, target: Path) -> None:
    """Renames a file, over an existing one too, or a folder."""
    patiently(lambda: source.replace(target))
