"""OpenAI's chat request, checked, as messages and options for `Runtime.stream`.

What the Runtime checks itself (numbers, adapter names) is left to it. A parameter that would
change the answer and is not supported is refused, never ignored; unknown ones are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from dlp_edge.server.http_errors import HttpError
from dlp_edge.types import Message

if TYPE_CHECKING:
    from dlp_edge.runtime.options import GenerateOptions

# Parameter -> option of the Runtime; those that OpenAI has not are named as in vLLM.
_NAMES = {
    name: name for name in "temperature top_p top_k min_p repetition_penalty seed stop".split()
}
_NAMES["stop_token_ids"] = "stop_tokens"
_OWN = (
    "adapters",
    "forbid",
    "select",
    "p",
    "k",
    "weigh",
    "min_confidence",
    "kv",
    "speculate",
    "repetition_stop",
    "requests",
)
MOST_LOGPROBS = 20
MOST_STOPS = 64  # stop strings: each is looked for at every token
LONGEST_STOP = 1000
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# Unsupported parameters and the values with which they ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


Models = Mapping[str, str | Mapping[str, float] | None]
"""Model name -> the `adapters` option that it stands for."""


@dataclass(frozen=True)
class ChatRequest:
    """A request for an answer.

    Attributes:
        messages: the conversation, or a text.
        model: as the client named it.
        options: for `Runtime.stream`.
        stream: whether the answer is wanted piece by piece.
        include_usage: whether a stream ends with the token counts.
    """

    model: str
    messages: list[Message] | str
    options: GenerateOptions
    stream: bool
    include_usage: bool


def parse_request(
    body: Mapping[str, Any],
    models: Models,
    max_messages: int,
    max_new_tokens: int,
) -> ChatRequest:
    """The request in a body.

    Args:
        models: what `model` may name.
        max_new_tokens: where the request sets no limit.

    Raises:
        HttpError: 400 something is wrong, 404 no such model.
    """
    body = {name: value for name, value in body.items() if value is not None}
    refuse_unsupported(body, _NEUTRAL)
    options = common_options(body, models)
    options["logprobs"] = _logprobs(body)
    options["json_schema"] = json_schema(body.get("response_format", {"type": "text"}))
    options["max_new_tokens"] = most_tokens(
        body, ("max_completion_tokens", "max_tokens"), max_new_tokens
    )
    if body.get("tools", []) != []:
        options["tools"] = body["tools"]
        options["tool_choice"] = _tool_choice(body.get("tool_choice", "auto"))
        options["parallel_tool_calls"] = body.get("parallel_tool_calls", True)
    options["requests"] = "auto"
    options.update(own_options(body))
    stream_options = body.get("stream_options", {})
    if not isinstance(stream_options, dict):
        raise wrong("stream_options", "is no object")
    return ChatRequest(
        model=body["model"],
        messages=parse_messages(body.get("messages"), max_messages),
        options=cast("GenerateOptions", options),
        stream=flag("stream", body),
        include_usage=flag("include_usage", stream_options),
    )


def refuse_unsupported(body: Mapping[str, Any], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Raises HttpError for a parameter that asks for something that is not supported."""
    for name, values in neutral.items():
        if name in body and body[name] not in values:
            raise wrong(name, "is not supported with this value. Leave it out")


def common_options(body: Mapping[str, Any], models: Models) -> dict[str, Any]:
    """The options that OpenAI's interfaces share: the model's adapters, sampling, stop strings."""
    model = body.get("model")
    if not isinstance(model, str):
        raise wrong("model", "is missing or no text. GET /v1/models lists the names")
    if model not in models:
        names = ", ".join(models)
        raise HttpError(
            404, f"The model {model!a} does not exist. Use: {names}.", "model", "model_not_found"
        )
    options: dict[str, Any] = {own: body[name] for name, own in _NAMES.items() if name in body}
    if type(options.get("seed")) is int:
        options["seed"] %= 1 << 63  # OpenAI's may be negative
    stops = options.get("stop")
    listed = [stops] if isinstance(stops, str) else stops if isinstance(stops, list) else []
    if len(listed) > MOST_STOPS:
        raise wrong("stop", f"has {len(listed)} strings, {MOST_STOPS} are allowed")
    if any(isinstance(stop, str) and len(stop) > LONGEST_STOP for stop in listed):
        raise wrong("stop", f"has a string of more than {LONGEST_STOP} characters")
    options["adapters"] = models[model]
    return options


def most_tokens(body: Mapping[str, Any], names: Sequence[str], default: int) -> int:
    """The most tokens of the answer, under any of OpenAI's names."""
    for name in names:
        if name in body:
            count = body[name]
            if type(count) is not int or count < 1:
                raise wrong(name, f"is {count!a}. Choose 1 or more, or leave it out")
            return count
    return default


def _logprobs(body: Mapping[str, Any]) -> int | None:
    """How many alternatives are wanted beside each token's log probability; None for neither."""
    count = body.get("top_logprobs", 0)
    if type(count) is not int or not 0 <= count <= MOST_LOGPROBS:
        raise wrong("top_logprobs", f"is no whole number from 0 to {MOST_LOGPROBS}")
    if flag("logprobs", body):
        return count
    if count:
        raise wrong("top_logprobs", "needs logprobs to be true")
    return None


def _tool_choice(given: object) -> object:
    """OpenAI's choice as the Runtime's: a word, or the name of the tool."""
    if not isinstance(given, dict):
        return given
    function = given.get("function")
    if given.get("type") != "function" or not isinstance(function, dict):
        raise wrong("tool_choice", "is neither auto, none, required nor a function")
    return function.get("name", "")


def json_schema(given: object, param: str = "response_format") -> dict[str, Any] | None:
    """The schema that a `response_format` asks for; None for text."""
    if not isinstance(given, dict):
        raise wrong(param, "is no object")
    if given.get("type") == "text":
        return None
    if given.get("type") == "json_object":
        return {"type": "object"}
    named = given.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if given.get("type") != "json_schema" or not isinstance(schema, dict):
        raise wrong(param, "is neither text nor json_object nor json_schema with a schema")
    return schema


def own_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the Runtime that OpenAI's interface has no name for."""
    given = body.get("dlp_edge", {})
    if not isinstance(given, dict):
        raise wrong("dlp_edge", "is no object")
    for name in given:
        if name not in _OWN:
            raise wrong("dlp_edge", f"has no option {name!a}. It has: {', '.join(_OWN)}")
    return given


def parse_messages(given: object, most: int, param: str = "messages") -> list[Message]:
    """A conversation in OpenAI's form.

    Args:
        param: where it stands in the request.
    """
    if not isinstance(given, list) or not given:
        raise wrong(param, "is no list of messages")
    if len(given) > most:
        raise wrong(param, f"has {len(given)} messages, {most} are allowed. Send fewer")
    return [_message(message, param) for message in given]


def _message(given: object, param: str) -> Message:
    if not isinstance(given, dict):
        raise wrong(param, "holds something that is no message")
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(param, f"has the role {role!a}. Use: {', '.join(_ROLES)}")
    content = given.get("content")
    if given.get("function_call"):
        raise wrong(param, "has a function_call. Send tool_calls")
    if content is None and role == "assistant":  # as OpenAI's own clients send back
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise wrong(param, "has a content that is no text")
    checked = {"role": _ROLES[role], "content": content}
    if given.get("tool_calls"):
        checked["tool_calls"] = given["tool_calls"]
    return checked


def _part(given: object) -> str:
    """The text of one part of a content that is a list of parts."""
    text = given.get("text") if isinstance(given, dict) and given.get("type") == "text" else None
    if not isinstance(text, str):
        raise wrong("messages", "has a part that is no text. Send text only")
    return text


def flag(name: str, body: Mapping[str, Any]) -> bool:
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise wrong(name, "is neither true nor false")
    return value


def wrong(param: str, what: str) -> HttpError:
    return HttpError(400, f"{param} {what}.", param)
