"""An engine's process, seen from the one that gives the orders (`worker.py` is the other end)."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent.parent


class EngineError(Exception):
    """An engine cannot be loaded, or cannot do what it was told."""


class Process:
    """A worker; `begun` is when it was started (seconds since the epoch)."""

    def __init__(self, python: str, options: dict[str, Any]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed at the exit)
        command = [python, "-m", "benchmarks.engines.worker", json.dumps(options)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        self.begun = time.time()
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.pid = self._process.pid

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Gives an order and waits for the answer.

        Raises:
            EngineError: the engine died or refuses.
        """
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            raise EngineError(f"it ended with {self._process.returncode}: {' '.join(last)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()  # closes its stdin, at which it ends
        self._stderr.close()
