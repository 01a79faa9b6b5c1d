"""A request to `/v1/responses`, as messages and options for `Runtime.stream`.

The common part of that interface: nothing is stored, so a conversation is sent whole each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from dlp_edge.runtime.options import GenerateOptions
from dlp_edge.server.chat_request import (
    ChatRequest,
    Models,
    common_options,
    flag,
    json_schema,
    most_tokens,
    own_options,
    parse_messages,
    refuse_unsupported,
    wrong,
)

# Unsupported parameters and the values with which they ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "include": ([], ["reasoning.encrypted_content"]),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "max_tool_calls": (),
}
_TEXT_PARTS = ("input_text", "output_text", "text")


def parse_response(
    body: Mapping[str, Any], models: Models, max_messages: int, max_new_tokens: int
) -> ChatRequest:
    """The request in a body; see `parse_request`."""
    body = {name: value for name, value in body.items() if value is not None}
    refuse_unsupported(body, _NEUTRAL)
    options = common_options(body, models)
    text = body.get("text", {})
    if not isinstance(text, dict):
        raise wrong("text", "is no object")
    options["json_schema"] = _schema(text.get("format") or {"type": "text"})
    options["max_new_tokens"] = most_tokens(body, ("max_output_tokens",), max_new_tokens)
    if body.get("tools", []) != []:
        options["tools"] = body["tools"]
        choice = body.get("tool_choice", "auto")
        options["tool_choice"] = _named(choice) if isinstance(choice, dict) else choice
        options["parallel_tool_calls"] = body.get("parallel_tool_calls", True)
    options["requests"] = "auto"
    options.update(own_options(body))
    messages = _messages(body.get("input"))
    instructions = body.get("instructions")
    if instructions is not None:
        messages.insert(0, {"role": "system", "content": instructions})
    return ChatRequest(
        model=body["model"],
        messages=parse_messages(messages, max_messages, "input"),
        options=cast("GenerateOptions", options),
        stream=flag("stream", body),
        include_usage=True,
    )


def _schema(form: object) -> dict[str, Any] | None:
    """The schema that a `text.format` asks for; None for text."""
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}
    return json_schema(form, "text")


def _named(choice: Mapping[str, Any]) -> object:
    if choice.get("type") != "function":
        raise wrong("tool_choice", "is neither auto, none, required nor a function")
    return choice.get("name", "")


def _messages(given: object) -> list[dict[str, Any]]:
    """The input's items as chat messages."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise wrong("input", "is neither a text nor a list of items")
    messages: list[dict[str, Any]] = []
    for item in given:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _text(item.get("content"))})
        elif kind == "function_call":
            _add_call(messages, item)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "content": _text(item.get("output"))})
        elif kind != "reasoning":  # of other models; says nothing to this one
            raise wrong("input", f"has an item of type {kind!a}, which is not supported")
    return messages


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Adds a call to the assistant's message before it, or to one of its own."""
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(content: object) -> object:
    """A content's text, where its parts are texts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            raise wrong("input", "has a part that is no text. Send text only")
        if not isinstance(part.get("text"), str):
            raise wrong("input", "has a part without a text")
    return "".join(part["text"] for part in content)
