"""Who the server lets in, what happens when many come, go away or wait, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from dlp_edge import Reply, Runtime
from dlp_edge.runtime.engine.decoder import Decoder
from dlp_edge.server.access_middleware import Access
from dlp_edge.server.answering import Answering, Limits
from dlp_edge.server.app import build_app, models_of
from tests.testing.serving import HELLO, Served, is_free, serving, soon

Serve = Callable[..., Served]


@pytest.fixture
def serve(runtime: Runtime) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:
        yield lambda *access, **limits: stack.enter_context(serving(runtime, *access, **limits))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that take their time, so that there is a middle of an answer."""
    step = Decoder.step

    def slow_step(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return step(*arguments, **options)

    monkeypatch.setattr(Decoder, "step", slow_step)


@pytest.fixture
def replies(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Reply]]:
    """What asks for the reply of each stream that was started."""
    started: list[Callable[[], Reply]] = []
    start = runtime.stream

    def watched(*arguments: Any, **options: Any) -> Any:
        stream = start(*arguments, **options)
        started.append(stream._job.reply)
        return stream

    monkeypatch.setattr(runtime, "stream", watched)
    return started


def test_too_large_a_body_is_answered(served: Served) -> None:
    text = "x" * (3 << 20)
    with pytest.raises(openai.APIStatusError) as caught:
        served.client().chat.completions.create(
            model="base", messages=[{"role": "user", "content": text}]
        )
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8080", True),
        ("127.0.0.1:1", True),
        ("[::1]:8080", True),
        ("assistant.lan:80", True),
        ("evil.example", False),
        ("evil.example:8080", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_only_own_names_as_host(serve: Serve, host: str, allowed: bool) -> None:
    served = serve(Access(hosts=frozenset({"assistant.lan"})))
    for path in ("/health", "/v1/models"):
        status, _, body = served.ask("GET", path, headers=[("Host", host)])
        assert status == (200 if allowed else 403), body


def test_pages_need_to_be_allowed(serve: Serve) -> None:
    served = serve(Access(origins=frozenset({"https://good.example"})))
    body = json.dumps({"model": "base", "messages": HELLO, "max_tokens": 1}).encode()
    for origin, status in [
        ("https://good.example", 200),
        ("https://evil.example", 403),
        ("http://good.example", 403),
        ("http://localhost:3000", 403),
        ("null", 403),
    ]:
        headers = [("Origin", origin), ("Content-Type", "application/json")]
        found, sent, _ = served.ask("POST", "/v1/chat/completions", body, headers)
        assert found == status
        assert sent.get("access-control-allow-origin") == (origin if status == 200 else None)
    asking = ("Access-Control-Request-Method", "POST")
    for origin, status in [("https://good.example", 200), ("https://evil.example", 400)]:
        headers = [("Origin", origin), asking]
        assert served.ask("OPTIONS", "/v1/chat/completions", headers=headers)[0] == status
    assert serve().ask("GET", "/health", headers=[("Origin", "https://good.example")])[0] == 403


def test_the_key(serve: Serve) -> None:
    served = serve(Access(key="geheim-ß"))
    for key in ("wrong", "geheim", ""):
        headers = [("Authorization", f"Bearer {key}")]
        status, sent, body = served.ask("GET", "/v1/models", headers=headers)
        assert (status, sent["www-authenticate"]) == (401, "Bearer")
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert served.ask("GET", "/v1/models")[0] == 401
    good = "geheim-ß".encode().decode("latin-1")
    assert served.ask("GET", "/v1/models", headers=[("Authorization", f"Basic {good}")])[0] == 401
    assert served.ask("GET", "/v1/models", headers=[("Authorization", f"Bearer {good}")])[0] == 200
    assert served.ask("GET", "/health")[0] == 200
    plain = serve(Access(key="secret"))
    assert plain.client("secret").models.list().data
    with pytest.raises(openai.AuthenticationError):
        plain.client("other").models.list()


def test_several_clients_get_what_one_alone_gets(served: Served, runtime: Runtime) -> None:
    words = ["apples", "rows", "letters", "days"]

    def ask(word: str) -> str:
        stream = word in ("apples", "rows")
        messages: Any = [{"role": "user", "content": f"Say {word}."}]
        found = served.client().chat.completions.create(
            model="auto", messages=messages, max_tokens=30, stream=stream
        )
        if isinstance(found, openai.Stream):
            return "".join(piece.choices[0].delta.content or "" for piece in found)
        return found.choices[0].message.content or ""

    expected = [runtime.generate(f"Say {word}.", max_new_tokens=30).text for word in words]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, words * 4)) == expected * 4


@pytest.mark.usefixtures("slow")
def test_a_full_line_turns_away(serve: Serve, runtime: Runtime) -> None:
    served = serve(waiting=1, parallel=2)
    client = served.client()

    def ask() -> str | None:
        found = client.chat.completions.create(model="base", messages=HELLO, max_tokens=20)
        return found.choices[0].message.content

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask) for _ in range(3)]
        assert soon(lambda: served.waiting() == 3)
        with pytest.raises(openai.RateLimitError) as caught:
            ask()
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert client.models.list().data  # what needs no turn is answered
        assert served.server._answering._queue.running == 2
        expected = runtime.generate(HELLO, adapters={}, max_new_tokens=20).text
        assert [future.result() for future in asked] == [expected] * 3


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_runtime(
    served: Served, runtime: Runtime, replies: list[Callable[[], Reply]], stream: bool
) -> None:
    body = {"model": "base", "messages": HELLO, "max_tokens": 100, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps(body),
        {"Content-Type": "application/json"},
    )
    assert soon(lambda: bool(replies) and replies[0]().usage.completion_tokens > 2)
    connection.sock.close() if connection.sock else None
    connection.close()
    assert soon(lambda: is_free(runtime))
    reply = replies[0]()
    assert reply.finish_reason == "cancelled"
    assert reply.usage.completion_tokens < 40


@pytest.mark.usefixtures("slow")
def test_who_goes_away_while_waiting_leaves_the_line(serve: Serve) -> None:
    served = serve(waiting=1, parallel=1)
    holding = served.client().chat.completions.create(
        model="base", messages=HELLO, max_tokens=100, stream=True
    )
    next(holding)
    with pytest.raises(openai.APITimeoutError):
        served.client().with_options(timeout=0.3).chat.completions.create(
            model="base", messages=HELLO
        )
    assert soon(lambda: served.waiting() == 1)
    holding.close()
    assert soon(lambda: served.waiting() == 0)
    found = served.client().chat.completions.create(model="base", messages=HELLO, max_tokens=5)
    assert found.usage is not None


def test_who_takes_nothing_counts_as_gone(runtime: Runtime) -> None:
    """Straight into the application: the buffers of a real connection hold a whole answer."""
    limits = Limits(send_seconds=0.2)
    answering = Answering(runtime, models_of(runtime), limits, on_error=lambda error: None)
    app = build_app(runtime, answering, models_of(runtime), Access())
    body = {"model": "base", "messages": HELLO, "max_tokens": 100, "stream": True}
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": headers,
        "query_string": b"",
    }

    async def main() -> None:
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.sleep(60)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        await asyncio.wait_for(app(scope, receive, send), 5)

    asyncio.run(main())
    assert soon(lambda: is_free(runtime))


def test_an_internal_error_is_not_told(
    serve: Serve, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    client = served.client()

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("/home/secret")

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "stream", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="base", messages=HELLO)
        assert "secret" not in caught.value.response.text
        assert caught.value.type == "server_error"
    step, count = Decoder.step, iter(range(100))

    def breaks_later(*arguments: Any, **options: Any) -> Any:
        return step(*arguments, **options) if next(count) < 8 else broken()

    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "step", breaks_later)
        stream = client.chat.completions.create(
            model="base", messages=HELLO, max_tokens=100, stream=True
        )
        with pytest.raises(openai.APIError, match="Internal error"):
            list(stream)
    assert [str(error) for error in served.errors] == ["/home/secret"] * 2
    assert client.chat.completions.create(model="base", messages=HELLO, max_tokens=5).choices


@pytest.mark.usefixtures("slow")
def test_stopping_ends_the_answer_under_way_in_order(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlp_edge.server.listening.GRACE", 0.3)
    served = serve(parallel=1)
    stream = served.client().chat.completions.create(
        model="base", messages=HELLO, max_tokens=100, stream=True
    )
    first = next(stream)
    assert first.choices[0].finish_reason is None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.client().chat.completions.create, model="base", messages=HELLO)
        assert soon(lambda: served.waiting() == 2)
        served.server.should_exit = True
        assert list(stream)[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.InternalServerError, match="stopping"):
            waiting.result()
    served.thread.join(5)
    assert not served.thread.is_alive()


def test_half_headers_take_no_place_from_those_who_ask(serve: Serve) -> None:
    served = serve(Access(key="secret"))
    held = []
    for _ in range(150):
        sock = socket.create_connection(("127.0.0.1", served.port), timeout=10)
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")
        held.append(sock)
    begun = time.monotonic()
    try:
        with served.client("secret") as client:
            assert list(client.models.list())
        assert time.monotonic() - begun < 5
    finally:
        for sock in held:
            sock.close()


def test_a_header_that_trickles_in_has_a_deadline(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlp_edge.server.connection.HEADER_SECONDS", 0.5)
    served = serve(Access())
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock:
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun < 10:
                sock.sendall(b"X")
                time.sleep(0.05)
        assert time.monotonic() - begun < 5


def test_a_wrong_key_is_refused_without_reading_on(serve: Serve) -> None:
    served = serve(Access(key="secret"))
    sent = 0
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        sock.sendall(b"Content-Type: application/json\r\nContent-Length: 64000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(640):
                sent += sock.send(b" " * 100_000)
    assert sent < 32_000_000


@pytest.mark.parametrize(
    "host",
    [
        "evil.com@localhost", "localhost#evil.com", "[::1]evil.com", "localhost/evil.com",
        "localhost?x", "localhost:80:80", "localhost:port", "localhost evil.com", "[localhost]",
        "localhost\\evil.com", "127.0.0.1.evil.com", "[::1", "::1", "0x7f.1", "",
    ],
)  # fmt: skip
def test_hosts_that_only_look_like_this_machine(serve: Serve, host: str) -> None:
    assert serve(Access()).ask("GET", "/v1/models", headers=[("Host", host)])[0] == 403


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:80", "[::1]"]
)
def test_hosts_of_this_machine(serve: Serve, host: str) -> None:
    assert serve(Access()).ask("GET", "/v1/models", headers=[("Host", host)])[0] == 200
