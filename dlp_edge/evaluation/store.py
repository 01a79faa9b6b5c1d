"""Finished measurements on the disk, so that a killed evaluation goes on where it was.

One line of JSON each, under a digest of all that it depends on: the bundle, the prompt, the
options. So a changed bundle or task file simply finds nothing, a changed scoring rule finds all.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dlp_edge.errors import ResourceError

FORMAT = 1  # of the records; another one finds nothing


class Store:
    """Records in a file, each written through as soon as it is there."""

    def __init__(self, path: Path, bundle: str) -> None:
        """Opens a file, or begins it.

        Args:
            bundle: a digest of the bundle; part of every key.

        Raises:
            ResourceError: the file cannot be written.
        """
        self._bundle = bundle
        self._records: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                self._read(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ResourceError(
                f"{path} cannot be written ({error.strerror})", "Choose another folder"
            ) from error

    def key(self, *what: object) -> str:
        """The digest of what a record depends on, besides the bundle."""
        text = json.dumps([FORMAT, self._bundle, *what], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str) -> dict[str, Any] | None:
        """The record under a key, if there is one."""
        return self._records.get(key)

    def of(self, key: str) -> dict[str, Any]:
        """The record under a key that has one."""
        return self._records[key]

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Adds a record.

        Raises:
            ResourceError: the disk is full, or the like.
        """
        self._records[key] = record
        try:
            self._file.write(json.dumps({"key": key, "record": record}, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"an answer cannot be stored ({error.strerror})", "Make room on the disk"
            ) from error

    def close(self) -> None:
        self._file.close()

    def _read(self, path: Path) -> None:
        """Takes what is whole; a line that was cut off by a kill is mended by a line break."""
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
                self._records[entry["key"]] = entry["record"]
            except (ValueError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
