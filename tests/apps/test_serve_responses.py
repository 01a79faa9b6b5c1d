"""`/v1/responses`, driven by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dlp_edge import Runtime
from tests.testing.serving import HELLO, Served
from tests.testing.tools import CLOCK

TOOL: Any = {"type": "function", **CLOCK}


def test_a_whole_response(served: Served, runtime: Runtime) -> None:
    said = [{"role": "system", "content": "Be brief."}, *HELLO]
    expected = runtime.generate(said, adapters="sql", max_new_tokens=20)
    found = served.client().responses.create(
        model="sql", instructions="Be brief.", input=HELLO[0]["content"], max_output_tokens=20
    )
    assert found.output_text == expected.text
    assert found.status == ("incomplete" if expected.finish_reason == "length" else "completed")
    assert found.usage is not None
    assert found.usage.input_tokens == expected.usage.prompt_tokens
    assert found.usage.output_tokens == expected.usage.completion_tokens


def test_events_build_up_the_response(served: Served, runtime: Runtime) -> None:
    expected = runtime.generate(HELLO, adapters={}, max_new_tokens=20)
    events: list[Any] = list(
        served.client().responses.create(
            model="base", input=HELLO, max_output_tokens=20, stream=True
        )
    )
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:-1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert events[2].item.content == []
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == expected.text
    assert events[-1].response.output_text == expected.text
    assert events[-4].text == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_their_results(served: Served, runtime: Runtime, stream: bool) -> None:
    expected = runtime.generate(
        HELLO, adapters={}, tools=[CLOCK], tool_choice="tell", max_new_tokens=90
    ).tool_calls
    client = served.client()
    answer: Any = client.responses.create(
        model="base",
        input=HELLO,
        tools=[TOOL],
        tool_choice={"type": "function", "name": "tell"},
        max_output_tokens=90,
        stream=stream,
    )
    events = list(answer) if stream else []
    response = events[-1].response if stream else answer
    assert [(item.type, item.name, item.arguments) for item in response.output] == [
        ("function_call", call.name, call.arguments_text) for call in expected
    ]
    if stream:
        deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(deltas) == "".join(call.arguments_text for call in expected)
    call = response.output[0]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    history = [*HELLO, call.model_dump(exclude_none=True), result]
    following = client.responses.create(model="base", input=history, max_output_tokens=5)
    said: Any = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [expected[0].message]},
        {"role": "tool", "content": "noon"},
    ]
    assert following.output_text == runtime.generate(said, adapters={}, max_new_tokens=5).text


def test_json_by_schema(served: Served) -> None:
    schema: Any = {"type": "json_schema", "name": "yes", "schema": {"enum": ["yes"]}}
    found = served.client().responses.create(model="base", input=HELLO, text={"format": schema})
    assert json.loads(found.output_text) == "yes"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{"}]}, None),
        ({"instructions": 1}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"text": 1}, "text"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"tools": [{"type": "web_search_preview"}]}, None),
        ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_refusals(served: Served, changes: dict[str, Any], param: str | None) -> None:
    body = {"model": "base", "input": "Tom", "max_output_tokens": 1, **changes}
    status, _, answer = served.ask("POST", "/v1/responses", json.dumps(body).encode())
    assert (status, json.loads(answer)["error"]["param"]) == (400, param)
    assert served.errors == []
