"""A lock on a path between processes; the operating system frees that of a process that dies."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlp_edge.errors import ResourceError


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of `target` while the block runs.

    The lock is a file in the system's temporary folder, so that `target` itself may be replaced.

    Raises:
        ResourceError: another process, or another call of this one, is writing to the target.
    """
    from filelock import FileLock, Timeout  # who only loads a bundle does without

    name = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"dlp-edge-{name}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ResourceError(
            f"another process is writing to {target}", "Wait for it, or choose another place"
        ) from error
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be opened ({error.strerror})", "Check the rights of the folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
