"""Writes a folder or file atomically: writes it next to the target, syncs it, then renames it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dlp_edge.atomic.lock import locked
from dlp_edge.atomic.sharing import move, patiently
from dlp_edge.errors import DlpEdgeError, ResourceError, UsageError

_AT_FDCWD = -100  # linux/fcntl.h: relative to the working directory
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # macOS: sys/stdio.h


@contextmanager
def staged(target: Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `target` if the block succeeds.

    However the block ends, the target is either the old folder or the complete new one. A killed
    process leaves at most one extra folder next to it (the unfinished new one or the replaced old
    one), which the next call for this target removes. Without an atomic exchange of folders
    (Windows), a process killed between two renames leaves the old folder under another name, and
    the next call restores it.

    Args:
        is_ours: whether an existing folder may be replaced.

    Raises:
        UsageError: the target exists and may not be replaced, or its parent is missing.
        ResourceError: the disk is full, the path is not writable, or another process is writing
            to it.
    """
    target = target.resolve()
    with locked(target):
        staging = _beside(target, "staging")
        try:
            restore_folder(target)
            check_target(target, is_ours)
            _remove(staging)
            staging.mkdir()
            yield staging
            for path in (*staging.rglob("*"), staging):
                sync_folder(path) if path.is_dir() else sync(path)
            replace_folder(staging, target)
        except OSError as error:
            raise resource_error(target, error) from error
        finally:
            _remove(staging)


def _beside(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}"


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def check_target(target: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raises UsageError if `staged` would."""
    try:
        _check_target(target.resolve(), is_ours)
    except (OSError, ValueError) as error:  # a name that the system does not allow
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{target} cannot be written ({reason})", "Choose another path") from error


def _check_target(target: Path, is_ours: Callable[[Path], bool]) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", "Create it first")
    if target == Path.cwd():
        raise UsageError("the output is the current folder", "Choose a separate folder")
    if target.exists() and not (target.is_dir() and (is_ours(target) or not any(target.iterdir()))):
        raise UsageError(
            f"{target} exists and was not written by dlp-edge", "Choose another path, or remove it"
        )


def check_space(target: Path, needed: int) -> None:
    """Raises ResourceError unless the disk has `needed` bytes free."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ResourceError(
            f"{target.parent} has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed",
            "Free some space, or choose another disk",
        )


def write_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes a new file and syncs it to disk; an existing one is removed first.

    A link that somebody has put in its place is removed too, never followed.
    """
    patiently(lambda: path.unlink(missing_ok=True))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_BINARY", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    with os.fdopen(os.open(path, flags, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Writes a private file atomically: beside it, under a name that nobody can know in advance,
    then renamed."""
    new = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.new")
    try:
        write_file(new, data, 0o600)
        move(new, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def sync(path: Path) -> None:
    """Syncs a file to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries to disk, where supported.

    Windows and some network file systems do not support it; the content is correct either way.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(new: Path, target: Path) -> None:
    """Moves a finished folder to `target`, in place of a folder that is there.

    A folder cannot be renamed onto a non-empty one, so the two are exchanged, and the old one is
    removed under the new one's name. Otherwise the old folder is renamed first; if the new one
    then cannot be moved, the old one comes back, at the latest by `restore_folder`.
    """
    old = _beside(target, "old")
    if not (target.exists() and exchange(new, target)):
        if target.exists():
            move(target, old)
        try:
            move(new, target)
        except OSError:
            if old.exists():
                move(old, target)
            raise
    sync_folder(target.parent)
    _remove(new)
    _remove(old)


def restore_folder(target: Path) -> None:
    """Puts back what a `replace_folder` that was killed between two renames left under another
    name; removes it if the new folder is there."""
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        move(old, target)
    _remove(old)


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two files or folders atomically; returns False, changing nothing, if unsupported.

    Uses `renameat2` on Linux and `renamex_np` on macOS. Windows and some file systems have no
    equivalent.
    """
    a, b = os.fsencode(first), os.fsencode(second)
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "linux":
            status = library.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE)
        elif sys.platform == "darwin":
            status = library.renamex_np(a, b, _RENAME_SWAP)
        else:
            return False
    except (OSError, AttributeError, TypeError):  # the library or function is missing
        return False
    return bool(status == 0)


def resource_error(target: Path, error: OSError) -> DlpEdgeError:
    """Returns the error for a target that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"the disk of {target} is full; nothing was written", "Free some space and try again"
        )
    return ResourceError(
        f"{target} cannot be written ({error.strerror or error})",
        "Check the path and its permissions",
    )
