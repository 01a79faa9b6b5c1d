"""Opens files in untrusted folders: regular files only, without blocking."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from dlp_edge.atomic.sharing import patiently

BLOCK = 8 << 20

OnFraction = Callable[[float], None]
"""Called with the fraction done, 0 to 1."""


def no_progress(fraction: float) -> None:
    """The default for `on_progress`: reports nothing."""


def check_regular(path: Path) -> os.stat_result:
    """Raises OSError unless the path itself is a regular file: no link, pipe, device or folder."""
    info = path.lstat()
    # Windows also has junctions, which are links but not symbolic ones: reparse points.
    reparse = getattr(info, "st_file_attributes", 0) & getattr(
        stat, "FILE_ATTRIBUTE_REPARSE_POINT", 0
    )
    if not stat.S_ISREG(info.st_mode) or reparse:
        raise OSError(errno.EINVAL, "not a regular file")
    return info


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, without following links or blocking on pipes.

    The caller reads, measures and hashes through the returned file, so replacing the path in the
    meantime has no effect.

    Raises:
        OSError: it is missing, not a regular file, or not readable.
    """
    check_regular(path)  # merely opening a device can have side effects
    flags = os.O_RDONLY
    for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    descriptor = patiently(lambda: os.open(path, flags))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # replaced between the two calls
            raise OSError(errno.EINVAL, "not a regular file")
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_at_most(path: Path, size: int) -> bytes:
    """Returns the content of a file.

    Raises:
        OSError: as for `open_regular`, or the file is larger than `size` bytes.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > size:
            raise OSError(errno.EFBIG, f"larger than {size} bytes")
        data = bytearray()
        while block := file.read(min(BLOCK, size + 1 - len(data))):
            data += block
            if len(data) > size:
                raise OSError(errno.EFBIG, f"larger than {size} bytes")
    return bytes(data)


def read_followed(path: Path, size: int) -> bytes:
    """`read_at_most` for a path that the user names, and that may be a link.

    Raises:
        OSError: as for `read_at_most`, or links lead in a circle.
    """
    try:
        target = path.resolve()
    except RuntimeError as error:  # from Python 3.13 on an OSError
        raise OSError(errno.ELOOP, "links lead in a circle") from error
    return read_at_most(target, size)


def sha256_of(path: Path, on_progress: OnFraction = no_progress) -> str:
    """Returns the SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hash_at_most(file, path.stat().st_size, on_progress)[1]


def hash_at_most(file: BinaryIO, expected: int, on_progress: OnFraction) -> tuple[int, str]:
    """Returns size and SHA-256; stops once the file exceeds the expected size."""
    digest, size = hashlib.sha256(), 0
    while size <= expected and (block := file.read(BLOCK)):
        digest.update(block)
        size += len(block)
        on_progress(min(1.0, size / max(1, expected)))
    return size, digest.hexdigest()
