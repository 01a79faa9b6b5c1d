"""`dlp-edge verify` on bad bundles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.cli.main import main
from tests.security.attacks import ATTACKS, Attack

pytestmark = pytest.mark.slow

# `verify` makes the checks that loading makes, which meets all attacks (test_attacks.py).
TRIED = ATTACKS if os.environ.get("DLP_EDGE_ALL_ATTACKS") else ATTACKS[::10]


@pytest.mark.parametrize(("name", "attack", "expected"), TRIED, ids=[a[0] for a in TRIED])
def test_verify_says_in_one_line_what_is_wrong(
    bundle_copy: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    attack: Attack,
    expected: type[Exception],
) -> None:
    attack(bundle_copy)
    capsys.readouterr()
    assert main(["verify", str(bundle_copy)]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert len(shown.err.splitlines()) == 1
    with pytest.raises(expected):
        verify_bundle(bundle_copy)


def test_verify_tells_what_is_wrong_as_json(
    bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle_copy / "tokenizer.json").unlink()
    assert main(["verify", str(bundle_copy), "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "BundleError"
    assert "tokenizer.json" in error["cause"]


def test_verify_in_a_process_of_its_own(bundle_copy: Path, tmp_path: Path) -> None:
    """The good twin, and every fortieth attack."""

    def verify(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dlp_edge.cli.main", "verify", str(folder)]
        return subprocess.run(command, capture_output=True, text=True)

    done = verify(bundle_copy)
    assert (done.returncode, done.stderr) == (0, "")
    assert "GB/s" in done.stdout
    for number, (_, attack, _) in enumerate(ATTACKS[::40]):
        folder = Path(shutil.copytree(bundle_copy, tmp_path / f"bad-{number}"))
        attack(folder)
        done = verify(folder)
        assert done.returncode == 3, done.stderr
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
