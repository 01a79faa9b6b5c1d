"""Coverage-guided fuzzing of everything that reads a stranger's bytes.

    pip install atheris                                     # Linux, Python up to 3.13
    python tests/fuzz/fuzz.py TARGET CORPUS [-max_total_time=60] [other options of libFuzzer]

TARGET is bundle, runtime, peft, session or samples. CORPUS is a folder that keeps what was found,
so that a later run goes on from there. An input that crashes or hangs is written to the current
folder, as crash-* or timeout-*; give it in place of CORPUS to try it again.
"""

from __future__ import annotations

import atexit
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dlp_edge"]):
    from tests.security.fuzz import targets

from tests.security.fuzz.mutate import mutator
from tests.security.fuzz.seeds import seeds_of, write_seeds

LIMITS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=400000", "-len_control=0")


def keeping(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The target; an input that makes it raise is kept, however the process then ends."""

    def run(data: bytes) -> None:
        try:
            target(data)
        except BaseException:
            Path(f"crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    return run


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in targets.TARGETS:
        sys.exit(__doc__)
    name, corpus = sys.argv[1], Path(sys.argv[2])
    if not corpus.is_file():
        write_seeds(name, corpus)
    atexit.register(targets.clean_up)
    words = [sys.argv[0], str(corpus), *LIMITS, *sys.argv[3:]]
    atheris.Setup(
        words, keeping(targets.TARGETS[name]), custom_mutator=mutator(name, seeds_of(name))
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
