"""Two paths of one file system change places in one step, where the system can do that."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_AT_FDCWD = -100  # linux/fcntl.h: paths as they are
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # macOS: sys/stdio.h


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two files or folders; False, with nothing done, where that is not possible.

    Linux has `renameat2`, macOS `renamex_np`, Windows nothing; some file systems have neither.
    """
    a, b = os.fsencode(first), os.fsencode(second)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "linux":
            done = library.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE)
        elif sys.platform == "darwin":
            done = library.renamex_np(a, b, _RENAME_SWAP)
        else:
            return False
    except (OSError, AttributeError, TypeError):  # no such library, or no such function in it
        return False
    return bool(done == 0)
