"""Stores finished measurements on disk, so that interrupted evaluations resume.

Each record is a JSON line under a digest of its inputs: the bundle, the prompt and the options.
Changing one of these invalidates the record; changing a scoring rule does not.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dlp_edge.errors import ResourceError

FORMAT = 1  # of the records; a change invalidates all


class Store:
    """Records in a file, each flushed as soon as it is added."""

    def __init__(self, path: Path, bundle: str) -> None:
        """Open or create the file.

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
        """The key of a record: a digest of its inputs and the bundle."""
        text = json.dumps([FORMAT, self._bundle, *what], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key, or None."""
        return self._records.get(key)

    def of(self, key: str) -> dict[str, Any]:
        """The record of a key that is known to exist."""
        return self._records[key]

    def put(self, key: str, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            ResourceError: the file cannot be written, for example because the disk is full.
        """
        self._records[key] = record
        try:
            self._file.write(json.dumps({"key": key, "record": record}, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"an answer cannot be stored ({error.strerror})", "Free disk space"
            ) from error

    def close(self) -> None:
        self._file.close()

    def _read(self, path: Path) -> None:
        """Read complete lines; terminate a line that was cut off, so that appending is safe."""
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
