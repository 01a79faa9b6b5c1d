"""`dlp-edge serve` as a program: what it prints, refuses and exits with."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.testing.paths import ROOT

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "dlp_edge.cli.main", "serve"]


@contextmanager
def started(
    bundle: Path, *options: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program on a free port, and the line that it prints once it answers."""
    process = subprocess.Popen(
        [*COMMAND, str(bundle), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=None if sys.platform == "win32" else heed_ctrl_c,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's "&" has it ignored


def refused(bundle: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, str(bundle), *options], capture_output=True, text=True)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="cannot send itself ctrl-C there")
def test_it_says_where_it_is_answers_and_ends_by_ctrl_c(tiny_bundle: Path) -> None:
    question: Any = [{"role": "user", "content": "Hello"}]
    with started(tiny_bundle, "--json", DLP_EDGE_KEY="secret") as (process, line):
        said = json.loads(line)
        assert said["models"] == ["auto", "base", "sums", "sql", "email"]
        client = OpenAI(base_url=said["url"], api_key="secret", max_retries=0)
        found = client.chat.completions.create(model="sql", messages=question, max_tokens=4)
        assert found.usage is not None
        assert found.usage.completion_tokens == 4
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="guess").models.list()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
        assert (process.returncode, rest, errors) == (130, "", "interrupted\n")
    with started(tiny_bundle) as (process, line):
        page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
        snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        [snippet] = [each for each in snippets if "base_url" in each]
        assert "http://127.0.0.1:8080/v1" in snippet
        exec(snippet.replace("http://127.0.0.1:8080/v1", line.strip()), {})
        assert OpenAI(base_url=line.strip(), api_key="x").models.list().data
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (143, "")


def test_a_port_in_use_is_said_in_one_line(tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, error = refused(tiny_bundle, "--port", port)
        assert code == 4
        assert f"127.0.0.1:{port} cannot be listened on" in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--host", "0.0.0.0"), 2, "other machines can reach 0.0.0.0"),
        (("--host", "no such host"), 2, "no host"),
        (("--port", "70000"), 2, "port is 70000"),
        (("--max-body", "0"), 2, "less than 1"),
        (("--max-waiting", "-1"), 2, "less than 0"),
    ],
)
def test_refusals(tiny_bundle: Path, options: tuple[str, ...], code: int, message: str) -> None:
    found, error = refused(tiny_bundle, *options)
    assert found == code
    assert message in error
    assert len(error.splitlines()) == 1


def test_no_bundle(tmp_path: Path) -> None:
    assert refused(tmp_path / "no", "--port", "0")[0] == 3
