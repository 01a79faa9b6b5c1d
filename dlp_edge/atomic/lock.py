"""An inter-process lock on a path, released by the operating system if its holder dies."""

from __future__ import annotations

import hashlib
import os
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlp_edge.errors import ResourceError


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of `target` while the block runs.

    The lock file is in the system's temporary folder, so `target` itself can be replaced.

    Raises:
        ResourceError: another process, or another call in this one, holds the lock.
    """
    from filelock import FileLock, Timeout  # not needed to load a bundle

    # Windows and macOS know one folder by several spellings, which must share a lock.
    spelling = unicodedata.normalize("NFC", str(target.resolve())).casefold()
    name = hashlib.sha256(os.fsencode(spelling)).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"dlp-edge-{name}.lock"
    if path.is_symlink():  # versions of the library empty the file
        raise ResourceError(f"{path} is a link", "Remove it")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ResourceError(
            f"another process is writing to {target}",
            "Wait for it to finish, or choose another path",
        ) from error
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be opened ({error.strerror})", "Check the permissions of the folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
