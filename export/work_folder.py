"""What an export has computed so far, kept beside its target while it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlp_edge.atomic.sharing import move

KEY = "key.json"


@contextmanager
def work_folder(out: Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a folder whose content survives a kill or Ctrl-C, for the next export to the same
    target; success and errors remove it.

    Args:
        out: the export's target.
        key: what the content depends on; content of another key is removed.
    """
    folder = out.parent / f".{out.name}.work"
    wanted = json.dumps(key, sort_keys=True)
    mark = folder / KEY
    try:
        if not (mark.is_file() and mark.read_text(encoding="utf-8") == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            mark.write_text(wanted, encoding="utf-8")
        yield folder
    except Exception:  # re-raised; Ctrl-C is none, and keeps what is computed
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path | None]:
    """Yield a folder to fill, which becomes `folder` once the block succeeds; None if an earlier
    call filled it already."""
    if folder.is_dir():
        yield None
        return
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    yield part
    move(part, folder)


def stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of the files in a folder; empty for neither."""
    if not path.exists():
        return []
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in paths if file.is_file()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]
