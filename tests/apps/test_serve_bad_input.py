"""What a client or another process may do to the server: it answers in form, and stays alive."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Runtime
from tests.testing.serving import HELLO, Served, serving
from tests.testing.tools import CLOCK

HUGE = 10 << 20
MOST_SECONDS = 20  # on a machine that does other things, too


@pytest.fixture(scope="module")
def roomy(runtime: Runtime) -> Iterator[Served]:
    """A server that lets large bodies in."""
    with serving(runtime, body=64 << 20) as served:
        yield served


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"properties": {"x": schema}}
    return schema


def call(arguments: str) -> Any:
    calls = [{"id": "1", "function": {"name": "tell", "arguments": arguments}}]
    return [*HELLO, {"role": "assistant", "content": "", "tool_calls": calls}]


BODIES: dict[str, tuple[str, Any]] = {
    "a message of 10 MB": (
        "chat/completions",
        {"messages": [{"role": "user", "content": "x" * HUGE}]},
    ),
    "100,000 parts": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 100_000}]},
    ),
    "arguments of 10 MB": ("chat/completions", {"messages": call(json.dumps({"x": "y" * HUGE}))}),
    "a tool of 10 MB": ("chat/completions", {"tools": [{**CLOCK, "description": "x" * HUGE}]}),
    "many values": (
        "chat/completions",
        {"tools": [{"name": "x", "parameters": {"enum": [0] * 100_000}}]},
    ),
    "many arguments": ("chat/completions", {"messages": call(json.dumps({"x": [0] * 100_000}))}),
    "deep parameters": ("chat/completions", {"tools": [{"name": "x", "parameters": nested(300)}]}),
    "deep arguments": (
        "chat/completions",
        {"messages": call('{"x":' * 400 + "1" + "}" * 400)},
    ),
    "bottomless arguments": (
        "chat/completions",
        {"messages": call('{"x":' * 100_000 + "1" + "}" * 100_000)},
    ),
    "a prompt of 10 MB": ("completions", {"prompt": "x" * HUGE}),
    "an input of 10 MB": ("responses", {"input": "x" * HUGE}),
    "100,000 items": ("responses", {"input": [{"role": "user", "content": "x"}] * 100_000}),
    "1,000 stop strings": ("chat/completions", {"stop": [f"x{i}" for i in range(1000)]}),
    "a foreign adapter": ("chat/completions", {"dlp_edge": {"adapters": "../../sql"}}),
}


@pytest.mark.parametrize("name", BODIES)
def test_large_bodies_get_an_answer(roomy: Served, name: str) -> None:
    path, changes = BODIES[name]
    body = {"model": "base", "max_tokens": 1, **changes}
    if path == "chat/completions":
        body.setdefault("messages", HELLO)
    started = time.perf_counter()
    status, _, answer = roomy.ask("POST", f"/v1/{path}", json.dumps(body).encode())
    assert status == 400, answer[:300]
    assert json.loads(answer)["error"]["message"].endswith(".")
    assert time.perf_counter() - started < MOST_SECONDS
    assert roomy.errors == []
    assert roomy.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/main.js/x", "/page//etc/passwd"]
)
def test_only_the_pages_own_files(served: Served, path: str) -> None:
    assert served.ask("GET", path)[0] == 404


def test_two_servers_on_one_bundle(tiny_bundle: Path) -> None:
    with (
        Runtime(tiny_bundle) as one,
        Runtime(tiny_bundle) as other,
        serving(one) as first,
        serving(other) as second,
    ):
        answers = [
            served.client().chat.completions.create(model="auto", messages=HELLO, max_tokens=20)
            for served in (first, second, first)
        ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1


def test_a_bundle_that_changes_under_it(bundle_copy: Path) -> None:
    """The server keeps the edition that it loaded, even if its files go."""

    def ask(served: Served) -> str | None:
        found = served.client().chat.completions.create(model="sql", messages=HELLO, max_tokens=9)
        return found.choices[0].message.content

    with Runtime(bundle_copy) as runtime, serving(runtime) as served:
        before = ask(served)
        with Runtime(bundle_copy) as other:
            other.remove_adapter("sql")
        assert ask(served) == before
        for path in bundle_copy.rglob("*"):
            if path.is_file():
                path.write_bytes(b"changed")
        assert ask(served) == before
        shutil.rmtree(bundle_copy)
        assert ask(served) == before
        assert [model.id for model in served.client().models.list()][-2:] == ["sql", "email"]
        assert served.errors == []
