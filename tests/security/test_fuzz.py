"""A short run of the fuzzer, so that it keeps working and what it finds at once is found; hours of
it are for people (tests/fuzz/fuzz.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testing.paths import ROOT

pytestmark = pytest.mark.slow

pytest.importorskip(
    "atheris", reason="atheris is not installed (Linux x86-64, Python 3.11 to 3.13)"
)

FUZZ = "tests.security.fuzz.fuzz"
RSS_LIMIT = 2048  # MB
SECONDS = {"bundle": 10, "runtime": 6, "peft": 5, "session": 2, "samples": 2}


@pytest.mark.slow
@pytest.mark.parametrize("target", SECONDS)
def test_nothing_crashes_or_hangs(target: str, tmp_path: Path) -> None:
    import resource  # POSIX, as atheris is

    # Linux counts the peak of the process that starts the fuzzer as the fuzzer's own.
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    limits = (f"-max_total_time={SECONDS[target]}", f"-rss_limit_mb={RSS_LIMIT + own_peak}")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.security.fuzz.fuzz",
            target,
            str(tmp_path / "corpus"),
            *limits,
            "-seed=1",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    found = [path.name for path in tmp_path.iterdir() if path.name != "corpus"]
    assert done.returncode == 0, done.stderr[-5000:]
    assert found == []
    assert "DONE" in done.stderr
    assert len(list((tmp_path / "corpus").iterdir())) > 2
