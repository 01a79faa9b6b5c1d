"""Where a bundle is fetched from: a folder of a web server, or a repository of the hub."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from dlp_edge.errors import ResourceError, UsageError

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 4  # of a file, each going on where the last one broke off
PAUSE = 0.5  # seconds before the second attempt; twice as many before each further one
KEPT = "What was fetched is kept: the next try goes on from there"

OnBytes = Callable[[int], None]
"""Called with the size of the file so far."""


class Origin(Protocol):
    """Somewhere that has the files of one bundle."""

    def fetch(self, name: str, path: Path, limit: int, on_bytes: OnBytes) -> bool:
        """Writes a file, going on with what `path` already holds; False if there is no such file.

        Args:
            limit: bytes; a longer file is cut there.

        Raises:
            ResourceError: the origin cannot be reached, or the file cannot be written.
        """


@dataclass(frozen=True)
class WebFolder:
    """A folder of a web server, over HTTP."""

    url: str

    def fetch(self, name: str, path: Path, limit: int, on_bytes: OnBytes) -> bool:
        address = f"{self.url.rstrip('/')}/{name}"
        for attempt in range(ATTEMPTS):
            try:
                return _download(address, path, limit, on_bytes)
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return False
                if error.code < 500:
                    raise _unreachable(address, f"HTTP {error.code}") from error
                problem: Exception = error
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.filename is not None:  # our own file
                    raise ResourceError(
                        f"{path} cannot be written ({error.strerror})", "Check the disk"
                    ) from error
                problem = error
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE * 2**attempt)
        raise _unreachable(address, str(problem)) from problem


def _download(address: str, path: Path, limit: int, on_bytes: OnBytes) -> bool:
    """One attempt. Asks for what is missing, and begins anew where the server gives all."""
    begun = path.stat().st_size if path.is_file() else 0
    if begun >= limit:
        return True
    request = urllib.request.Request(address, headers={"Range": f"bytes={begun}-"} if begun else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        size = begun if answer.status == 206 else 0
        announced = answer.headers.get("Content-Length")
        with path.open("ab" if size else "wb") as file:
            while size < limit and (data := answer.read(min(CHUNK, limit - size))):
                file.write(data)
                size += len(data)
                on_bytes(size)
    if announced is not None and size < min(limit, int(announced)):
        raise ConnectionError("the connection broke off")
    return True


def _unreachable(address: str, problem: str) -> ResourceError:
    return ResourceError(f"{address} cannot be fetched ({problem})", KEPT)


@dataclass(frozen=True)
class HubRepository:
    """A repository of the Hugging Face hub, by its `huggingface_hub` (the extra `hub`)."""

    name: str
    revision: str | None

    def fetch(self, name: str, path: Path, limit: int, on_bytes: OnBytes) -> bool:
        hub = require_hub()
        errors = import_module("huggingface_hub.errors")
        try:
            hub.hf_hub_download(
                self.name,
                name,
                revision=self.revision,
                local_dir=path.parent,
                endpoint=os.environ.get("HF_ENDPOINT"),
                tqdm_class=_silent_bar(on_bytes),
            )
        except Exception as error:  # of httpx, of huggingface_hub, of the system
            # Without a network there is no "local" entry, which is a kind of missing entry there.
            offline = isinstance(error, errors.LocalEntryNotFoundError)
            if isinstance(error, errors.EntryNotFoundError) and not offline:
                return False
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ResourceError(
                f"{self.name} cannot be fetched from the hub ({reason})",
                f"Check the name, the network and HF_TOKEN. {KEPT}",
            ) from error
        return True


def require_hub() -> Any:
    """huggingface_hub.

    Raises:
        UsageError: it is not installed.
    """
    try:
        # Unseen by PyInstaller, which would freeze torch and whatever huggingface_hub works with.
        return import_module("huggingface_hub")
    except ImportError as error:
        raise UsageError(
            "the hub needs the package huggingface_hub", "Install dlp-edge[hub]"
        ) from error


def _silent_bar(on_bytes: OnBytes) -> type:
    """A class of bars that tells the size instead of drawing it."""
    tqdm: Any = import_module("tqdm").tqdm

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": False, "file": _Nowhere()})

        def update(self, count: float | None = 1) -> bool | None:
            shown: bool | None = super().update(count)
            on_bytes(int(self.n))
            return shown

    return Silent


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...
