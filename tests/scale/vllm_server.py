"""A real vLLM server on loopback, started by an export's own launch file."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 900


class VllmServer:
    """One server; `start` it again after `kill`.

    Args:
        cores: those that its threads are bound to, such as "0-3": left to itself, every server
            takes the same ones.
    """

    def __init__(self, python: str, export: Path, log: Path, cores: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._python = python
        self._export = export
        self._log = log
        self._cores = cores
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            **os.environ,
            "PORT": str(self.port),
            "PYTHON": self._python,
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": self._cores,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._export / "serve.sh"), "--dtype", "float32"],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def wait(self) -> float:
        """Waits until it is well; returns the seconds that took."""
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            assert self._process is not None
            assert self._process.poll() is None, f"vLLM ended; see {self._log}"
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return time.monotonic() - began
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(f"vLLM does not start; see {self._log}")

    def kill(self) -> None:
        """As a crash: all of its processes at once."""
        if self._process is not None:
            for process in self._tree():
                process.send_signal(signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def resident_megabytes(self) -> float:
        """Memory of its own processes that they share with no other."""
        return sum(process.memory_full_info().uss for process in self._tree()) / 1e6

    def complete(self, name: str, prompt: list[int], tokens: int = 1) -> tuple[int, float]:
        """A completion under a model name: status and seconds."""
        body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        began = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                response.read()
                return response.status, time.perf_counter() - began
        except urllib.error.HTTPError as error:
            return error.code, time.perf_counter() - began

    def _tree(self) -> list[Any]:
        assert self._process is not None
        parent = psutil.Process(self._process.pid)
        return [*parent.children(recursive=True), parent]
