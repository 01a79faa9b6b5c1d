"""A lock on a path between processes; the operating system frees that of a process that dies."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlp_edge.errors import ResourceError

if sys.platform == "win32":
    import msvcrt

    def _take(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of `target` while the block runs.

    The lock is a file in the system's temporary folder, so that `target` itself may be replaced.

    Raises:
        ResourceError: another process, or another call of this one, is writing to the target.
    """
    name = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"dlp-edge-{name}.lock"
    try:
        file = path.open("ab")
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be opened ({error.strerror})", "Check the rights of the folder"
        ) from error
    with file:
        try:
            _take(file.fileno())
        except OSError as error:
            raise ResourceError(
                f"another process is writing to {target}", "Wait for it, or choose another place"
            ) from error
        yield
