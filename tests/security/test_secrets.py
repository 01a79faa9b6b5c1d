"""Keys appear in no log, no error text and no traceback of the server and the command line."""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Runtime
from dlp_edge.bundle.signing import TrustedKey
from dlp_edge.errors import DlpEdgeError
from dlp_edge.server.access_middleware import Access
from tests.testing.serving import serving

KEY = "sk-geheim-1234567890"
pytestmark = pytest.mark.slow


@pytest.fixture
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """Everything that any logger writes, however fine."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.removeHandler(handler)
    root.setLevel(before)


def test_a_server_tells_no_key(
    runtime: Runtime,
    logged: io.StringIO,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    with serving(runtime, Access(key=KEY)) as served:
        wrong = KEY[:-1] + "x"
        for header in (
            f"Bearer {KEY}",
            f"Bearer {wrong}",
            f"Basic {KEY}",
            KEY,
            "Bearer " + KEY * 99,
        ):
            for path in ("/v1/models", "/nowhere", f"/v1/models?key={KEY}"):
                with contextlib.suppress(http.client.HTTPException):
                    _, sent, body = served.ask("GET", path, headers=[("Authorization", header)])
                    told.append(repr(sent) + body.decode())
        good = [("Authorization", f"Bearer {KEY}"), ("Content-Type", "application/json")]
        for content in (b"{", b'{"model": 1}', b"\xff", b"[]"):
            _, sent, body = served.ask("POST", "/v1/chat/completions", content, good)
            told.append(repr(sent) + body.decode())

        def broken(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("broken")

        with monkeypatch.context() as patched:
            patched.setattr(runtime, "stream", broken)
            chat = b'{"model": "base", "messages": [{"role": "user", "content": "Hello"}]}'
            status, sent, body = served.ask("POST", "/v1/chat/completions", chat, good)
            assert status == 500
            told.append(repr(sent) + body.decode())
        told += ["".join(traceback.format_exception(error)) for error in served.errors]
    assert len(served.errors) == 1
    told += [logged.getvalue(), *capfd.readouterr()]
    for text in told:
        assert KEY[:8] not in text
    assert KEY not in repr(Access(key=KEY))


def test_a_refused_signing_key_is_not_told(tiny_bundle: Path, tmp_path: Path) -> None:
    secret = "MC4CAQAwBQYDK2VwBCIEIGeheimGeheimGeheimGeheimGeheimGeheimGeh"
    key = tmp_path / "mine"
    for begin in ("PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "PUBLIC KEY", "OPENSSH PRIVATE KEY", "X"):
        key.write_text(f"-----BEGIN {begin}-----\n{secret}\n-----END {begin}-----\n")
        for words in (["sign", str(tiny_bundle), "--key"], ["verify", str(tiny_bundle), "--key"]):
            done = subprocess.run(
                [sys.executable, "-m", "dlp_edge.cli.main", *words, str(key)],
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode not in (0, 1), done.stderr
            assert "eheim" not in done.stdout + done.stderr
        with pytest.raises(DlpEdgeError) as caught:
            TrustedKey(key)
        assert "eheim" not in "".join(traceback.format_exception(caught.value))
