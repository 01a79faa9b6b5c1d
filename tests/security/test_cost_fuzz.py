"""A short run of the fuzzer that maximises cost; hours of it are for people."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.testing.paths import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_found_costs_more_than_the_limits() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.fuzz.cost", "5", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-4_000:]
    assert "over the limits: 0" in done.stdout
