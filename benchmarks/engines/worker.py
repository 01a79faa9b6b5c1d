"""An engine in a process of its own, which does what it is told line by line.

    python -m benchmarks.engines.worker '{"engine": "llama", "model": "FILE.gguf", ...}'

A line on stdin is a JSON object, its answer one on stdout:

    {"do": "generate", "ids": [...], "count": 128, "adapters": {"a": 0.6}} -> prefill, decode: s
    {"do": "loss", "ids": [...], "adapters": {}}                           -> loss: nats a token
    {"do": "peak"}                                                         -> bytes: peak so far

What an engine cannot do answers {"error": "..."}.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.engines.interface import Engine

CLASSES = {
    "dlp": "Dlp",
    "genai": "Genai",
    "llama": "Llama",
    "openvino": "OpenVino",
    "paper": "Paper",
    "transformers_peft": "TransformersPeft",
}
WARM_UP = 64  # tokens to read before each measurement, and 8 to write


def load(options: dict[str, Any]) -> Engine:
    """The engine of a worker's options: `engine`, and what its class takes."""
    name = options.pop("engine")
    module = importlib.import_module(f"benchmarks.engines.{name}")
    engine: Engine = getattr(module, CLASSES[name])(**options)
    return engine


def do(engine: Engine, order: dict[str, Any]) -> dict[str, Any]:
    """Carries out one line."""
    if order["do"] == "peak":
        return {"bytes": peak_memory()}
    engine.set_adapters(order["adapters"])
    if order["do"] == "loss":
        return {"loss": engine.loss(order["ids"])}
    if order.get("warm", True):
        engine.generate(order["ids"][:WARM_UP], 8)
    answer = engine.generate(order["ids"], order["count"])
    found = {"prefill": answer.prefill, "decode": answer.decode, "tokens": answer.tokens}
    return {**found, "clock": time.time()}


def peak_memory() -> int:
    """The most that this process held in memory, in bytes, on Linux and macOS."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage tells there began before exec, with the parent's memory
        (line,) = (
            line for line in status.read_text("ascii").splitlines() if line.startswith("VmHWM:")
        )
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    answers = _own_stdout()
    engine = load(json.loads(sys.argv[1]))
    for line in sys.stdin:
        try:
            answer = do(engine, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _own_stdout() -> TextIO:
    """Standard output for answers alone; what an engine prints there goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
