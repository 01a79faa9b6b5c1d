"""`dlp-edge front` as a program: what it prints, refuses and exits with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from dlp_edge import Runtime
from dlp_edge.cli.main import main
from tests.testing.fake_vllm import fake_vllms
from tests.testing.fronts import make_router_folder

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "dlp_edge.cli.main", "front"]


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    return make_router_folder(tiny_bundle, tmp_path / "rack")


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle) as runtime:
        yield runtime


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_it_says_where_it_is_answers_and_ends_by_sigterm(folder: Path, runtime: Runtime) -> None:
    with fake_vllms(runtime, 1) as (fake,):
        process = subprocess.Popen(
            [*COMMAND, str(folder), "--upstream", fake.url, "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            assert said["models"] == ["auto", "base", "sums", "sql", "email"]
            client = OpenAI(base_url=said["url"], api_key="none", max_retries=0, timeout=60)
            answer = client.chat.completions.create(
                model="sql", messages=[{"role": "user", "content": "Select row 7"}], max_tokens=9
            )
            expected = runtime.generate("Select row 7", adapters="sql", max_new_tokens=9).text
            assert answer.choices[0].message.content == expected
            client.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, 143, -signal.SIGTERM)
            assert process.stderr is not None
            assert process.stderr.read() == ""
        finally:
            process.kill()
            process.communicate()


def test_what_it_refuses(folder: Path, tmp_path: Path) -> None:
    port = ["--port", "0"]
    for url in ("localhost:8000", "http://", "ftp://x", "http://x:99999", "http://[::1"):
        assert main(["front", str(folder), "--upstream", url, *port]) == 2
    assert main(["front", str(folder), *port]) == 2
    good = ["--upstream", "http://127.0.0.1:9"]
    assert main(["front", str(tmp_path), *good, *port]) == 3
    assert main(["front", str(folder), *good, *port, "--host", "0.0.0.0"]) == 2  # no key
