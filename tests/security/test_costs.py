"""Bundles that would cost without bound are refused or harmless within 5 s and 200 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.attacks import costs, graph_costs, template_costs, tokenizer_costs
from tests.security.attacks.forge import Attack
from tests.testing.paths import ROOT

pytestmark = pytest.mark.slow

ATTACKS = {
    **costs.ATTACKS,
    **graph_costs.ATTACKS,
    **template_costs.ATTACKS,
    **tokenizer_costs.ATTACKS,
}
MAX_SECONDS = 5.0
MAX_MEGABYTES = 200


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ATTACKS)
def test_costs(bundle_copy: Path, name: str) -> None:
    attack: Attack = ATTACKS[name]
    attack(bundle_copy)
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.cost_child", str(bundle_copy)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    stages = [json.loads(line) for line in done.stdout.splitlines()]
    assert [stage["stage"] for stage in stages] == ["verify", "use"]
    for stage in stages:
        assert stage["seconds"] < MAX_SECONDS, stage
        assert stage["megabytes"] < MAX_MEGABYTES, stage
