"""Measures what a bundle costs in a process of its own: python -m tests.security.cost_child BUNDLE.

Prints a line of JSON: for each stage its outcome, seconds and megabytes above the baseline, which
is the process after it has verified a good bundle.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dlp_edge import Runtime
from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.errors import DlpEdgeError
from tests.testing.paths import TINY

MAX_ADDRESSES = 6 << 30
MAX_CPU = 60
LONG_TEXT = 64_000
TEXTS = ("Hello", "a" * 4_900, *(c * (LONG_TEXT // len(c)) for c in ("a", "\ufdfa ", "\x00\x01")))


def _status(field: str) -> int:
    """Kilobytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(field)


def measure(call: Callable[[], object]) -> dict[str, object]:
    """Outcome, CPU seconds and peak megabytes of a call."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    baseline, begun = _status("VmRSS"), time.process_time()
    outcome = "passed"
    try:
        call()
    except DlpEdgeError as error:
        outcome = type(error).__name__ + ": " + str(error)[:200]
    return {
        "outcome": outcome,
        "seconds": round(time.process_time() - begun, 2),
        "megabytes": (_status("VmHWM") - baseline) // 1024,
    }


def use(bundle: Path) -> None:
    """Loads, answers a short text, and is asked a long one of several kinds."""
    with Runtime(bundle, threads=1) as runtime:
        errors = []
        for text in TEXTS:
            try:
                runtime.generate(text, max_new_tokens=2)
            except DlpEdgeError as error:
                errors.append(error)
        if errors:
            raise errors[0]


def main() -> None:
    verify_bundle(TINY / "bundle")
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESSES, MAX_ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU, MAX_CPU))
    bundle = Path(sys.argv[1])
    stages = {"verify": lambda: verify_bundle(bundle), "use": lambda: use(bundle)}
    for name, call in stages.items():
        print(json.dumps({"stage": name, **measure(call)}), flush=True)


if __name__ == "__main__":
    main()
