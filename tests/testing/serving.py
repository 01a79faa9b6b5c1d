"""A server for tests, with OpenAI's client and raw requests."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from openai import OpenAI

from dlp_edge import Runtime
from dlp_edge.server.access_middleware import Access
from dlp_edge.server.answering import Answering, Limits
from dlp_edge.server.app import build_app, models_of
from dlp_edge.server.listening import Server, listen, url_of
from dlp_edge.types import Activity

HELLO: Any = [{"role": "user", "content": "Tom has 3 apples."}]


class Served:
    """A server on a free port of loopback, on a thread of its own."""

    def __init__(self, runtime: Runtime, limits: Limits, access: Access) -> None:
        self.errors: list[Exception] = []
        models = models_of(runtime)
        answering = Answering(runtime, models, limits, self.errors.append)
        sock = listen("127.0.0.1", 0, has_key=access.key is not None)
        self.url = url_of(sock)
        self.port = sock.getsockname()[1]
        self.server = Server(build_app(runtime, answering, models, access), answering, 32)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [sock]})
        self.thread.start()

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, **options)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Sequence[tuple[str, str]] = (("Content-Type", "application/json"),),
    ) -> tuple[int, dict[str, str], bytes]:
        """A raw request: status, headers and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = dict(headers)
        connection.putrequest(method, path, skip_host="Host" in given)
        for name, value in given.items():
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        content = response.read()
        connection.close()
        return response.status, found, content

    def waiting(self) -> int:
        """How many requests wait or are answered."""
        return self.server._answering._queue.held

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(runtime: Runtime, access: Access | None = None, **limits: Any) -> Iterator[Served]:
    served = Served(runtime, Limits(**limits), access or Access())
    try:
        yield served
    finally:
        served.stop()


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true within some seconds."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def is_free(runtime: Runtime) -> bool:
    return runtime.activity == Activity(running=0, waiting=0)
