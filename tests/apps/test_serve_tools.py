"""Tools and plain completions through the server, driven by OpenAI's own client."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from dlp_edge import Runtime
from tests.testing.serving import HELLO, Served
from tests.testing.tools import CLOCK, WEATHER


def openai_form(tool: dict[str, Any]) -> Any:
    return {"type": "function", "function": tool}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "tell"}}])
def test_a_call_is_that_of_the_runtime(served: Served, runtime: Runtime, choice: Any) -> None:
    named = choice if isinstance(choice, str) else "tell"
    expected = runtime.generate(
        HELLO, tools=[CLOCK], tool_choice=named, max_new_tokens=90, adapters={}
    )
    found = served.client().chat.completions.create(
        model="base",
        messages=HELLO,
        tools=[openai_form(CLOCK)],
        tool_choice=choice,
        max_tokens=90,
    )
    message, finish = found.choices[0].message, found.choices[0].finish_reason
    assert finish == "tool_calls"
    assert message.content is None
    calls: Any = message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        (call.name, call.arguments_text) for call in expected.tool_calls
    ]
    assert all(call.type == "function" and call.id for call in calls)


def test_streamed_calls_add_up(served: Served) -> None:
    options: Any = {
        "model": "base",
        "messages": HELLO,
        "tools": [openai_form(CLOCK)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 90,
    }
    client = served.client()
    whole: Any = client.chat.completions.create(**options).choices[0].message.tool_calls
    first, *pieces, last = client.chat.completions.create(**options, stream=True)
    assert first.choices[0].delta.role == "assistant"
    deltas = [delta for piece in pieces for delta in piece.choices[0].delta.tool_calls]
    assert {delta.index for delta in deltas} == {0}
    assert deltas[0].id
    assert deltas[0].function.name == "tell"
    assert [delta.id for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert len(deltas) > 3
    text = "".join(delta.function.arguments for delta in deltas)
    assert text == whole[0].function.arguments
    assert last.choices[0].finish_reason == "tool_calls"


def test_a_conversation_with_a_result(served: Served, runtime: Runtime) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "tell", "arguments": '{"at": 1}'}}
    said: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    expected = runtime.generate(
        [*HELLO, {**said[1], "content": ""}, said[2]], adapters={}, max_new_tokens=9
    )
    found = served.client().chat.completions.create(model="base", messages=said, max_tokens=9)
    assert found.choices[0].message.content == expected.text
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens


def test_schemas_that_explode_are_refused(served: Served) -> None:
    doubled: Any = {"x0": {"type": "string"}}
    for i in range(24):
        inner = {"$ref": f"#/$defs/x{i}"}
        doubled[f"x{i + 1}"] = {"allOf": [inner, {"anyOf": [inner, inner]}]}
    exploding: list[Any] = [
        {"properties": {"x": {"type": "string", "pattern": "(a{1000}){1000}"}}},
        {"properties": {"x": {"type": "integer", "multipleOf": 987654321}}, "required": ["x"]},
        {"properties": {"x": {"$ref": "#/$defs/x24"}}, "$defs": doubled},
        {"$ref": "https://example.org/schema"},
        {"properties": {"x": {"type": "nothing"}}},
    ]
    asked = [{"tools": [{"name": "x", "parameters": schema}]} for schema in exploding]
    asked += [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        for schema in exploding
    ]
    for extra in asked:
        started = time.perf_counter()
        body = {"model": "base", "messages": HELLO, "max_tokens": 2, **extra}
        status, _, answer = served.ask("POST", "/v1/chat/completions", json.dumps(body).encode())
        assert status == 400, (extra, answer)
        assert time.perf_counter() - started < 5
    assert served.errors == []
    assert served.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_continues_the_text(served: Served, runtime: Runtime, stream: bool) -> None:
    expected = runtime.generate("Tom has", raw=True, adapters="sums", max_new_tokens=20)
    assert expected.usage.prompt_tokens == len("Tom has")  # a token a byte, and no template
    found: Any = served.client().completions.create(
        model="sums", prompt="Tom has", max_tokens=20, stream=stream
    )
    answers = list(found) if stream else [found]
    assert "".join(answer.choices[0].text for answer in answers) == expected.text
    assert answers[-1].choices[0].finish_reason == expected.finish_reason


def test_log_probabilities_of_a_completion(served: Served, runtime: Runtime) -> None:
    expected = runtime.generate("Tom", raw=True, adapters={}, max_new_tokens=5, logprobs=2).tokens
    found: Any = served.client().completions.create(
        model="base", prompt=["Tom"], max_tokens=5, logprobs=2
    )
    logprobs = found.choices[0].logprobs
    assert logprobs.token_logprobs == [token.logprob for token in expected]
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert all(len(top) <= 2 for top in logprobs.top_logprobs)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": ""}, None),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stream_options": 1}, "stream_options"),
    ],
)
def test_refused_completions(served: Served, changes: dict[str, Any], param: str | None) -> None:
    body = {"model": "base", "prompt": "Tom", "max_tokens": 1, **changes}
    status, _, answer = served.ask("POST", "/v1/completions", json.dumps(body).encode())
    assert (status, json.loads(answer)["error"]["param"]) == (400, param)


def test_tools_beside_a_schema(served: Served) -> None:
    """Where an answer has to be JSON, it is that or a call."""
    body: Any = {
        "model": "base",
        "messages": HELLO,
        "tools": [openai_form(WEATHER)],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "yes", "schema": {"enum": ["yes"]}},
        },
        "max_tokens": 90,
    }
    choice = served.client().chat.completions.create(**body).choices[0]
    if choice.finish_reason == "tool_calls":
        assert choice.message.tool_calls
    else:
        assert json.loads(choice.message.content or "") == "yes"
