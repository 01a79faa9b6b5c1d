"""The OpenAI-compatible server, driven by OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlp_edge import Runtime
from tests.testing.serving import HELLO, Served


def test_models(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["auto", "base", "sums", "sql", "email"]
    sql = client.models.retrieve("sql")
    assert sql.id == "sql"
    assert sql.model_extra["dlp_edge"]["adapter"]["rank"] == 8  # type: ignore[index]
    auto = client.models.retrieve("auto")
    assert auto.model_extra["dlp_edge"] == {"adapter": None}  # type: ignore[comparison-overlap]
    for name in ("nobody", "sql/sql", "../health", "sql%2F"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
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


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(served: Served, runtime: Runtime, stream: bool) -> None:
    expected = runtime.generate(HELLO, adapters="sums", max_new_tokens=20, logprobs=2).tokens
    found = served.client().chat.completions.create(
        model="sums", messages=HELLO, max_tokens=20, logprobs=True, top_logprobs=2, stream=stream
    )
    answers = found if isinstance(found, openai.Stream) else [found]
    content = [
        token
        for answer in answers
        if answer.choices[0].logprobs is not None
        for token in answer.choices[0].logprobs.content or ()
    ]
    assert [(token.token, token.logprob) for token in content] == [
        (token.text, token.logprob) for token in expected
    ]
    assert [[(t.token, t.logprob) for t in token.top_logprobs] for token in content] == [
        [(text, logprob) for _, text, logprob in token.top] for token in expected
    ]


def test_json_by_schema(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Bob"]}},
        "required": ["name"],
        "additionalProperties": False,
    }
    found = served.client().chat.completions.create(
        model="base",
        messages=HELLO,
        max_tokens=300,
        temperature=1.0,
        seed=1,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": schema},
        },
    )
    assert json.loads(found.choices[0].message.content or "")["name"] in ("Ann", "Bob")


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{"type": "function"}]}, 400, None),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, 400, None),
        ({"tools": {"name": "x"}}, 400, None),
        ({"tools": [{"name": "a b"}]}, 400, None),
        ({"tools": [{"name": "required"}]}, 400, None),
        ({"tools": [{"name": "x"}, {"name": "x"}]}, 400, None),
        ({"tools": [{"name": f"x{i}"} for i in range(129)]}, 400, None),
        ({"tools": [{"name": "x", "parameters": {"type": "string"}}]}, 400, None),
        ({"tools": [{"name": "x", "parameters": {"properties": 1}}]}, 400, None),
        ({"tools": [{"name": "x"}], "tool_choice": "y"}, 400, None),
        ({"tools": [{"name": "x"}], "tool_choice": {"type": "any"}}, 400, "tool_choice"),
        ({"tools": [{"name": "x"}], "parallel_tool_calls": 1}, 400, None),
        ({"tools": [{"name": "x"}], "dlp_edge": {"requests": "apart"}}, 400, None),
        ({"functions": [{"name": "x"}]}, 400, "functions"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}},
            400,
            None,
        ),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": [1]}, 400, "stream_options"),
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": ["x"]}, 400, "messages"),
        ({"messages": HELLO * 21}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, None),
        ({"messages": [{"role": "function", "content": "x"}]}, 400, "messages"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [1]}]}, 400, None),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": "x"}]}, 400, None),
        ({"messages": [*HELLO, {"role": "assistant", "function_call": {"a": 1}}]}, 400, "messages"),
        ({"messages": [{**HELLO[0], "tool_calls": [{"function": {"name": "x"}}]}]}, 400, None),
        ({"messages": [{"role": "user", "content": 1}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, None),
        ({"temperature": -1}, 400, None),
        ({"temperature": 10**400}, 400, None),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": "9"}, 400, "max_tokens"),
        ({"max_completion_tokens": -1}, 400, "max_completion_tokens"),
        ({"max_tokens": 10**400}, 400, None),
        ({"stop": [""]}, 400, None),
        ({"stop": ["x"] * 1000}, 400, "stop"),
        ({"stop": "x" * 5000}, 400, "stop"),
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
    "stream_options n tools tool_choice logprobs top_logprobs response_format min_p "
    "stop_token_ids dlp_edge"
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
        ("GET", "/v2", 404),
        ("POST", "/v1/embeddings", 501),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
    ]:
        found, _, answer = served.ask(method, path)
        assert found == status
        kind = "server_error" if status == 501 else "invalid_request_error"
        assert json.loads(answer)["error"]["type"] == kind
    form = (("Content-Type", "text/plain"),)
    assert served.ask("POST", "/v1/chat/completions", b"{}", form)[0] == 415
