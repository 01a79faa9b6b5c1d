"""The OpenAPI document: the paths, and the parameters that are checked."""

from __future__ import annotations

from typing import Any

from dlp_edge import __version__

Schema = dict[str, Any]


def openapi_document() -> Schema:
    """What is served, for programs that read OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "dlp-edge",
            "version": __version__,
            "description": "A local language model with skills, behind OpenAI's interface. "
            "Unknown parameters are ignored; those that would change an answer and are not "
            "supported are refused by name.",
        },
        "paths": {
            "/v1/chat/completions": _post("Answers a conversation", "ChatRequest", stream=True),
            "/v1/completions": _post("Continues a text", "CompletionRequest", stream=True),
            "/v1/responses": _post(
                "Answers a conversation, in the form of OpenAI's Responses",
                "ResponsesRequest",
                stream=True,
            ),
            "/v1/embeddings": {
                "post": {
                    "summary": "Is not supported: answers 501",
                    "requestBody": {"content": {"application/json": {"schema": {}}}},
                    "responses": {"501": _error("Not supported")},
                }
            },
            "/v1/models": _get("Lists the models: auto, base, and each adapter"),
            "/v1/models/{name}": {
                "get": {
                    **_get("Describes a model")["get"],
                    "parameters": [
                        {
                            "name": "name",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ],
                }
            },
            "/health": _get("Says that the server runs; needs no key"),
            "/metrics": {
                "get": {
                    "summary": "Counts requests, tokens and routings, for Prometheus",
                    "responses": {"200": {"description": "OK", "content": {"text/plain": {}}}},
                }
            },
        },
        "components": {
            "schemas": {
                "Error": _ERROR,
                "ChatRequest": _CHAT,
                "CompletionRequest": _COMPLETION,
                "ResponsesRequest": _RESPONSES,
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _get(summary: str) -> Schema:
    ok = {"description": "OK", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"get": {"summary": summary, "responses": {"200": ok, "4XX": _error("Refused")}}}


def _post(summary: str, body: str, stream: bool) -> Schema:
    content: Schema = {"application/json": {"schema": {"type": "object"}}}
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    schema = {"$ref": f"#/components/schemas/{body}"}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {
                "200": {"description": "The answer", "content": content},
                "4XX": _error("Refused, with the reason"),
                "503": _error("The server is stopping"),
            },
        }
    }


def _error(what: str) -> Schema:
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": what, "content": {"application/json": {"schema": schema}}}


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": properties}


_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_COUNT: Schema = {"type": ["integer", "null"], "minimum": 1}
_ERROR = _object(
    ["error"],
    error=_object(
        ["message", "type"],
        message=_TEXT,
        type=_TEXT,
        param={"type": ["string", "null"]},
        code={"type": ["string", "null"]},
    ),
)
_SAMPLING: dict[str, Schema] = {
    "model": {"type": "string", "description": "auto, base, or an adapter; see /v1/models"},
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 100},
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "stream": _FLAG,
}
_MORE_SAMPLING: dict[str, Schema] = {
    "top_k": {"type": ["integer", "null"], "minimum": 0},
    "min_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "seed": {"type": ["integer", "null"]},
    "stop": {
        "oneOf": [
            {"type": "string", "minLength": 1, "maxLength": 1000},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 64},
            {"type": "null"},
        ]
    },
    "max_tokens": _COUNT,
    "stream_options": {
        "type": ["object", "null"],
        "properties": {"include_usage": _FLAG},
    },
    "dlp_edge": {
        "type": ["object", "null"],
        "description": "options of the runtime that OpenAI's interface has no name for",
        "properties": {
            "adapters": {"description": "a name, names, or weights by name"},
            "forbid": {"type": "array", "items": _TEXT},
            "kv": {"enum": ["keep", "recompute"]},
            "requests": {"enum": ["together", "apart", "auto"]},
        },
    },
}
_TOOLS: Schema = {"type": ["array", "null"], "items": {"type": "object"}, "maxItems": 128}
_CHAT = _object(
    ["model", "messages"],
    messages={
        "type": "array",
        "minItems": 1,
        "items": _object(
            ["role"],
            role={"enum": ["system", "developer", "user", "assistant", "tool"]},
            content={"description": "a text, or parts of type text"},
            tool_calls={"type": ["array", "null"], "items": {"type": "object"}},
        ),
    },
    **_SAMPLING,
    **_MORE_SAMPLING,
    max_completion_tokens=_COUNT,
    logprobs=_FLAG,
    top_logprobs={"type": ["integer", "null"], "minimum": 0, "maximum": 20},
    response_format={
        "type": ["object", "null"],
        "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
    },
    tools=_TOOLS,
    tool_choice={"description": "auto, none, required, or a function"},
    parallel_tool_calls=_FLAG,
)
_COMPLETION = _object(
    ["model", "prompt"],
    prompt={"type": "string", "minLength": 1},
    **_SAMPLING,
    **_MORE_SAMPLING,
    logprobs={"type": ["integer", "null"], "minimum": 0, "maximum": 20},
)
_RESPONSES = _object(
    ["model", "input"],
    input={
        "oneOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "object"}, "minItems": 1},
        ]
    },
    instructions={"type": ["string", "null"]},
    **_SAMPLING,
    max_output_tokens=_COUNT,
    text={"type": ["object", "null"], "properties": {"format": {"type": "object"}}},
    tools=_TOOLS,
    tool_choice={"description": "auto, none, required, or a function"},
    parallel_tool_calls=_FLAG,
    dlp_edge=_MORE_SAMPLING["dlp_edge"],
)
