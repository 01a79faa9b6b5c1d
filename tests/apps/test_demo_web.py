"""`dlp-edge demo --web`, on the tests' own bundle in the demo's place."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.testing.serving import soon

# The demo's bundle is the one named on the command line.
MAIN = """
import sys
import dlp_edge.demo.demo as demo
from pathlib import Path
demo.bundle_folder = lambda: Path(sys.argv[1])
from dlp_edge.cli.main import main
sys.exit(main(["demo", "--web", "--json", "--quiet"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the browser is a shell script")
def test_the_demo_serves_its_page_and_opens_it(tiny_bundle: Path, tmp_path: Path) -> None:
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, str(tiny_bundle)],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": str(Path(shutil.which("sh") or "/bin/sh").parent), "BROWSER": str(browser)},
    ) as demo:
        try:
            assert demo.stdout is not None
            ready = json.loads(demo.stdout.readline())
            assert ready["models"] == ["auto", "base", "sums", "sql", "email"]
            with urllib.request.urlopen(ready["page"]) as page:
                assert b"<title>dlp-edge</title>" in page.read()
            assert soon(lambda: opened.exists() and opened.read_text().strip() == ready["page"])
        finally:
            demo.send_signal(signal.SIGINT)
        assert demo.wait(30) == 130
