"""Opening a file of a folder that a stranger filled: regular files only, and never a wait."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

BLOCK = 8 << 20

Tell = Callable[[float], None]


def say_nothing(fraction: float) -> None:
    pass


def check_regular(path: Path) -> os.stat_result:
    """Raises OSError unless the path itself is a regular file: no link, pipe, device or folder."""
    info = path.lstat()
    # Windows has links that are no symbolic links (junctions): reparse points.
    reparse = getattr(info, "st_file_attributes", 0) & getattr(
        stat, "FILE_ATTRIBUTE_REPARSE_POINT", 0
    )
    if not stat.S_ISREG(info.st_mode) or reparse:
        raise OSError(errno.EINVAL, "it is no regular file")
    return info


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading, without following a link and without waiting for a pipe.

    The caller reads, measures and hashes through what it gets, so that a file that is replaced
    meanwhile changes nothing.

    Raises:
        OSError: it is missing, is no regular file, or may not be read.
    """
    check_regular(path)  # opening a device can do something already
    flags = os.O_RDONLY
    for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # replaced between the two calls
            raise OSError(errno.EINVAL, "it is no regular file")
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_at_most(path: Path, size: int) -> bytes:
    """The content of a file.

    Raises:
        OSError: as `open_regular`, or it is larger than `size` bytes.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > size:
            raise OSError(errno.EFBIG, f"it is larger than {size} bytes")
        data = bytearray()
        while block := file.read(min(BLOCK, size + 1 - len(data))):
            data += block
            if len(data) > size:
                raise OSError(errno.EFBIG, f"it is larger than {size} bytes")
    return bytes(data)


def sha256_of(path: Path, tell: Tell = say_nothing) -> str:
    """SHA-256 of a file, streamed; `tell` is called with the fraction that is done."""
    with path.open("rb") as file:
        return hash_at_most(file, path.stat().st_size, tell)[1]


def hash_at_most(file: BinaryIO, expected: int, tell: Tell) -> tuple[int, str]:
    """Size and SHA-256; stops where there is more than expected."""
    digest, size = hashlib.sha256(), 0
    while size <= expected and (block := file.read(BLOCK)):
        digest.update(block)
        size += len(block)
        tell(min(1.0, size / max(1, expected)))
    return size, digest.hexdigest()
