"""The OpenAI-compatible server, driven by OpenAI's own client."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI

from dlp_edge import Reply, Runtime
from dlp_edge.runtime.decoder import Decoder
from dlp_edge.server.answering import Answering, Limits
from dlp_edge.server.app import build_app, models_of
from dlp_edge.server.guard import Access
from dlp_edge.server.listening import Server, listen, url_of

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
        self.server = Server(build_app(runtime, answering, models, access), answering, 16)
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

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bundle) as runtime:
        yield runtime


@pytest.fixture
def serve(runtime: Runtime) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(access: Access | None = None, **limits: Any) -> Served:
            served = Served(runtime, Limits(**limits), access or Access())
            stack.callback(served.stop)
            return served

        yield start


@pytest.fixture(scope="module")
def served(runtime: Runtime) -> Iterator[Served]:
    served = Served(runtime, Limits(body=20_000, messages=20), Access())
    yield served
    served.stop()


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
        answer = stream._answer
        started.append(answer.reply)
        return stream

    monkeypatch.setattr(runtime, "stream", watched)
    return started


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it becomes true within some seconds."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def is_free(runtime: Runtime) -> bool:
    with contextlib.suppress(openai.OpenAIError, Exception):
        runtime.generate("x", adapters={}, max_new_tokens=1, wait=False)
        return True
    return False


def test_models(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["auto", "base", "sums", "sql", "email"]
    assert client.models.retrieve("sql").id == "sql"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    status, _, body = served.ask("GET", "/health")
    assert (status, json.loads(body)) == (200, {"status": "ok"})


@pytest.mark.parametrize(("model", "adapters"), [("auto", None), ("base", {}), ("sql", "sql")])
def test_a_whole_answer_is_that_of_the_runtime(
    served: Served, runtime: Runtime, model: str, adapters: Any
) -> None:
    expected = runtime.generate(HELLO, adapters=adapters, max_new_tokens=30)
    found = served.client().chat.completions.create(model=model, messages=HELLO, max_tokens=30)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.model == model
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    own = found.model_extra["dlp_edge"]  # type: ignore[index]
    assert [(s["text"], s["fusion"]) for s in own["sentences"]] == [
        (sentence.text, sentence.fusion) for sentence in expected.sentences
    ]


def test_a_stream_carries_the_fusion_and_ends_with_usage(served: Served, runtime: Runtime) -> None:
    expected = runtime.generate(HELLO, max_new_tokens=40)
    *pieces, last, usage = served.client().chat.completions.create(
        model="auto",
        messages=HELLO,
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
    for piece in pieces[1:]:
        own = piece.model_extra["dlp_edge"]  # type: ignore[index]
        assert own["fusion"] == expected.sentences[own["sentence"]].fusion
        assert piece.choices[0].finish_reason is None
    assert last.choices[0].finish_reason == expected.finish_reason
    assert len(last.model_extra["dlp_edge"]["sentences"]) == len(expected.sentences)  # type: ignore[index]
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == expected.usage.completion_tokens
    assert len({piece.id for piece in [*pieces, last, usage]}) == 1


def test_parameters_reach_the_runtime(served: Served, runtime: Runtime) -> None:
    spoken = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say it."}]
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("Say", " it.")]},
    ]
    for sampling in ({"temperature": 0.9, "seed": 7, "top_p": 0.8}, {"stop": ["e", "t"]}):
        expected = runtime.generate(
            spoken,
            adapters={"sums": 0.4, "sql": 0.6},
            max_new_tokens=30,
            **sampling,  # type: ignore[typeddict-item]
        )
        own: Any = {"adapters": {"sums": 0.4, "sql": 0.6}}
        found = served.client().chat.completions.create(
            model="auto",
            messages=parts,
            max_tokens=30,
            user="ignored",
            n=1,
            frequency_penalty=0,
            extra_body={"dlp_edge": own, "unknown": [1]},
            **sampling,  # type: ignore[call-overload]
        )
        assert found.choices[0].message.content == expected.text


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": [1]}, 400, "stream_options"),
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": ["x"]}, 400, "messages"),
        ({"messages": HELLO * 21}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": 1}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, None),
        ({"temperature": -1}, 400, None),
        ({"temperature": 10**400}, 400, None),
        ({"max_tokens": 0}, 400, None),
        ({"max_tokens": 10**400}, 400, None),
        ({"stop": [""]}, 400, None),
        ({"dlp_edge": {"adapters": "nobody"}}, 400, None),
        ({"dlp_edge": {"what": 1}}, 400, "dlp_edge"),
        ({"dlp_edge": []}, 400, "dlp_edge"),
    ],
)
def test_refusals(served: Served, changes: dict[str, Any], status: int, param: str | None) -> None:
    body = {"model": "base", "messages": HELLO, "max_tokens": 1, **changes}
    found, _, answer = served.ask("POST", "/v1/chat/completions", json.dumps(body).encode())
    error = json.loads(answer)["error"]
    assert (found, error["param"]) == (status, param)
    assert error["message"].endswith(".")
    assert error["type"] == "invalid_request_error"


def test_a_prompt_beyond_the_context_has_its_code(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(
            model="base", messages=[{"role": "user", "content": "x" * 600}]
        )
    assert caught.value.code == "context_length_exceeded"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
FIELDS = (
    "model messages max_tokens max_completion_tokens temperature top_p top_k seed stop stream "
    "stream_options n tools logprobs response_format dlp_edge"
).split()


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), st.booleans())
def test_no_body_is_an_internal_error(served: Served, changes: dict[str, Any], own: bool) -> None:
    body: Any = {"model": "base", "messages": HELLO, "max_tokens": 1}
    body |= {"dlp_edge": changes} if own else changes
    found, _, answer = served.ask("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert found in (200, 400, 404), answer
    assert served.errors == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 9999, b'{"a":"\\ud8"}'])
def test_bodies_that_are_no_json_object(served: Served, body: bytes) -> None:
    status, _, answer = served.ask("POST", "/v1/chat/completions", body)
    assert status == 400
    assert "JSON" in json.loads(answer)["error"]["message"]


def test_what_is_not_served(served: Served) -> None:
    for method, path, status in [
        ("GET", "/", 404),
        ("POST", "/v1/completions", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
    ]:
        found, _, answer = served.ask(method, path)
        assert found == status
        assert json.loads(answer)["error"]["type"] == "invalid_request_error"
    form = (("Content-Type", "text/plain"),)
    assert served.ask("POST", "/v1/chat/completions", b"{}", form)[0] == 415


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


def test_a_full_line_turns_away(serve: Serve, runtime: Runtime) -> None:
    served = serve(waiting=1)
    client = served.client()

    def ask() -> str | None:
        found = client.chat.completions.create(model="base", messages=HELLO, max_tokens=5)
        return found.choices[0].message.content

    holding = runtime.stream("x", adapters={}, max_new_tokens=100)
    next(holding)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask) for _ in range(2)]
        answering = served.server._answering
        assert soon(lambda: answering._gate._inside == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            ask()
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert client.models.list().data  # what needs no turn is answered
        holding.close()
        expected = runtime.generate(HELLO, adapters={}, max_new_tokens=5).text
        assert [future.result() for future in asked] == [expected] * 2


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


def test_who_goes_away_while_waiting_leaves_the_line(serve: Serve, runtime: Runtime) -> None:
    served = serve(waiting=0)
    holding = runtime.stream("x", adapters={}, max_new_tokens=100)
    next(holding)
    with pytest.raises(openai.APITimeoutError):
        served.client().with_options(timeout=0.3).chat.completions.create(
            model="base", messages=HELLO
        )
    assert soon(lambda: served.server._answering._gate._inside == 0)
    holding.close()
    found = served.client().chat.completions.create(model="base", messages=HELLO, max_tokens=5)
    assert found.usage is not None


def test_who_takes_nothing_counts_as_gone(runtime: Runtime) -> None:
    """Straight into the application: the buffers of a real connection hold a whole answer."""
    import asyncio

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
    served = serve()
    stream = served.client().chat.completions.create(
        model="base", messages=HELLO, max_tokens=100, stream=True
    )
    first = next(stream)
    assert first.choices[0].finish_reason is None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.client().chat.completions.create, model="base", messages=HELLO)
        assert soon(lambda: served.server._answering._gate._inside == 2)
        served.server.should_exit = True
        assert list(stream)[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.InternalServerError, match="stopping"):
            waiting.result()
    served.thread.join(5)
    assert not served.thread.is_alive()
