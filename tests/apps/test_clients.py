"""Other people's clients against the server; each is skipped where it is not installed.

openai is in the other tests of the server.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.testing.serving import HELLO, Served
from tests.testing.tools import CLOCK

pytestmark = pytest.mark.slow
ASKED = "Tom has 3 apples."


def test_langchain(served: Served) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        base_url=served.url, api_key="none", model="base", max_tokens=90, temperature=0
    )
    assert model.invoke(ASKED).content
    assert "".join(str(chunk.content) for chunk in model.stream(ASKED))
    bound = model.bind_tools([{"type": "function", "function": CLOCK}], tool_choice="tell")
    (call,) = bound.invoke(ASKED).tool_calls[:1]
    assert call["name"] == "tell"
    assert 0 <= call["args"]["at"] <= 23
    streamed = None
    for chunk in bound.stream(ASKED):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert streamed.tool_calls[0]["args"] == call["args"]
    for method in ("json_schema", "function_calling"):
        schema = {"title": "tell", "description": "x", "type": "object", **CLOCK["parameters"]}
        structured = model.with_structured_output(schema, method=method, strict=None)
        assert 0 <= structured.invoke(ASKED)["at"] <= 23
    responses = langchain.ChatOpenAI(
        base_url=served.url, api_key="none", model="base", use_responses_api=True, max_tokens=20
    )
    assert responses.invoke(ASKED).content


def test_llama_index(served: Served) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    def options(**more: Any) -> dict[str, Any]:
        return {
            "model": "base",
            "api_base": served.url,
            "api_key": "none",
            "max_tokens": 90,
            "context_window": 512,
            **more,
        }

    completing = like.OpenAILike(**options())  # its default: /v1/completions
    assert completing.complete(ASKED).text
    assert [piece.delta for piece in completing.stream_complete(ASKED)]
    chatting = like.OpenAILike(**options(is_chat_model=True, is_function_calling_model=True))
    assert chatting.chat([ChatMessage(role="user", content=ASKED)]).message.content

    def tell(at: bool) -> str:
        """Time."""
        return str(at)

    tool = FunctionTool.from_defaults(tell)
    answer = chatting.chat_with_tools([tool], user_msg=ASKED, tool_required=True)
    (call,) = chatting.get_tool_calls_from_response(answer)[:1]
    assert call.tool_name == "tell"
    assert isinstance(call.tool_kwargs["at"], bool)


def test_litellm(served: Served) -> None:
    litellm = pytest.importorskip("litellm")
    common: dict[str, Any] = {
        "model": "openai/base",
        "api_base": served.url,
        "api_key": "none",
        "messages": HELLO,
        "max_tokens": 90,
    }
    assert litellm.completion(**common).choices[0].message.content
    pieces = list(litellm.completion(**common, stream=True))
    assert any(piece.choices[0].delta.content for piece in pieces)
    tools = [{"type": "function", "function": CLOCK}]
    answer = litellm.completion(**common, tools=tools, tool_choice="required")
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "tell"
    assert 0 <= json.loads(call.function.arguments)["at"] <= 23
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**common, "n": 2})


def test_the_openapi_document_holds(served: Served, tmp_path: Path) -> None:
    """Schemathesis asks what the document allows, and what it does not."""
    pytest.importorskip("schemathesis")
    import os
    import subprocess
    import sys

    root = served.url.removesuffix("/v1")
    checks = ("not_a_server_error", "status_code_conformance", "content_type_conformance")
    checks += ("response_schema_conformance",)
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
            *("run", f"{root}/openapi.json", "--url", root, "--checks", ",".join(checks)),
            *("--max-examples", "40", "--seed", "1", "--exclude-path", "/v1/embeddings"),
            *("--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--no-color"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "120"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert served.errors == []
