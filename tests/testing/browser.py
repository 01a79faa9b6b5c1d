"""A headless Chromium, driven over the pipe of its DevTools protocol: no package is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from queue import Empty, Queue
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Chromium reads its commands from descriptor 3 and writes to 4.
_LAUNCH = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab.

    Attributes:
        problems: errors that the page or its console reported.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self.problems: list[str] = []
        self._commands = commands
        self._messages: Queue[dict[str, Any]] = Queue()
        self._count = 0
        self._session: str | None = None
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """A command of the protocol, and its result."""
        self._count += 1
        command: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            try:
                message = self._messages.get(timeout=60)
            except Empty:
                raise TimeoutError(f"no answer to {method}") from None
            if message.get("id") == self._count:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def open(self, url: str, width: int = 1000, height: int = 640, dark: bool = False) -> None:
        """Goes to a page, in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression, of a promise if it is one."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Writes into the focused field."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "", shift: bool = False) -> None:
        """Presses a key."""
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _listen(self, answers: int) -> None:
        held = b""
        with contextlib.suppress(OSError):
            while piece := os.read(answers, 1 << 16):
                *whole, held = (held + piece).split(b"\0")
                for message in whole:
                    self._messages.put(json.loads(message))

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded":
            entry = message["params"]["entry"]
            if entry["level"] == "error":
                self.problems.append(f"{entry['text']} {entry.get('url', '')}")


@contextlib.contextmanager
def open_page() -> Iterator[Page]:
    """A tab of a browser of its own, which ends with it."""
    assert CHROMIUM is not None
    read, commands = os.pipe()
    answers, write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [
                *(sys.executable, "-c", _LAUNCH, str(read), str(write), CHROMIUM),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"),
                *("--hide-scrollbars", "--disable-extensions", "--disable-background-networking"),
            ],
            pass_fds=(read, write),
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        try:
            yield Page(commands, answers)
        finally:
            browser.kill()
            browser.wait()
            os.close(commands)
            os.close(answers)
