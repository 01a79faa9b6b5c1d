"""Writing a folder or a file all or nothing: made beside the target and put on the disk, then
renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dlp_edge.atomic.lock import locked
from dlp_edge.errors import DlpEdgeError, ResourceError, UsageError

_AT_FDCWD = -100  # linux/fcntl.h: paths as they are
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # macOS: sys/stdio.h


@contextmanager
def staged(target: Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error.

    Whatever ends the block, the target is either the old folder or the whole new one. A killed
    process leaves at most a folder beside it (the new one in the making, or the old one about to
    go), which the next call for this target removes. Where the system cannot exchange two folders
    in one step (Windows), a process killed between two renames leaves the old folder under another
    name, and the next call puts it back.

    Args:
        is_ours: whether an existing folder may be replaced.

    Raises:
        UsageError: the target exists and is not ours, or its parent is missing.
        ResourceError: the disk is full, the place cannot be written to, or another process is
            writing to it.
    """
    target = target.resolve()
    with locked(target):
        staging, old = _beside(target, "staging"), _beside(target, "old")
        try:
            if old.exists() and not target.exists():
                old.rename(target)
            check_target(target, is_ours)
            _remove(old)
            _remove(staging)
            staging.mkdir()
            yield staging
            for path in staging.iterdir():
                sync(path)
            sync_folder(staging)
            _replace(staging, target, old)
            sync_folder(target.parent)
        except OSError as error:
            raise resource_error(target, error) from error
        finally:
            _remove(staging)
            if target.exists():
                _remove(old)


def _beside(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}"


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def check_target(target: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raises UsageError where `staged` would."""
    target = target.resolve()
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", "Create it first")
    if target == Path.cwd():
        raise UsageError("the output is the current folder", "Name a folder of its own")
    if target.exists() and not (target.is_dir() and (is_ours(target) or not any(target.iterdir()))):
        raise UsageError(
            f"{target} exists and was not written by dlp-edge", "Choose another place, or remove it"
        )


def check_space(target: Path, needed: int) -> None:
    """Raises ResourceError where the disk has not `needed` bytes left."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ResourceError(
            f"{target.parent} has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed",
            "Make room, or choose another disk",
        )


def write_file(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can do that for folders;
    Windows and some network file systems cannot. What was written is right either way."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(staging: Path, target: Path, old: Path) -> None:
    """A folder with content cannot be renamed onto another: the two change places, and the old
    one, now the staging folder, goes. Where that cannot be done the old one steps aside first."""
    if target.exists():
        if exchange(staging, target):
            return
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


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


def resource_error(target: Path, error: OSError) -> DlpEdgeError:
    """What to tell a user whose target could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"the disk of {target} is full; nothing was written", "Make room and try again"
        )
    return ResourceError(
        f"{target} cannot be written ({error.strerror or error})", "Check the place and its rights"
    )
