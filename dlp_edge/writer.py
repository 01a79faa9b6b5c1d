"""Writing a folder all or nothing: a staging folder beside the target, then a rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dlp_edge.errors import DlpEdgeError, ResourceError, UsageError


@contextmanager
def staged(target: Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error.

    Whatever ends the block, the target is either the old folder or the whole new one. A killed
    process leaves at most the staging folder, which the next call for this target removes.

    Args:
        is_ours: whether an existing folder may be replaced.

    Raises:
        UsageError: the target exists and is not ours, or its parent is missing.
        ResourceError: the disk is full, or the place cannot be written to.
    """
    check_target(target, is_ours)
    staging = target.parent / f".{target.name}.staging"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            _sync(path)
        _replace(staging, target)
    except OSError as error:
        raise _resource_error(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raises UsageError where `staged` would."""
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", "Create it first")
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


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _replace(staging: Path, target: Path) -> None:
    """A folder with content cannot be renamed onto another, so the old one steps aside first."""
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _resource_error(target: Path, error: OSError) -> DlpEdgeError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"the disk of {target} is full; nothing was written", "Make room and try again"
        )
    return ResourceError(
        f"{target} cannot be written ({error.strerror or error})", "Check the place and its rights"
    )
