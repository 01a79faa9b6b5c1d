"""Tools that a model may call: what a request says of them, and how prompt and answer write them.

A chat template that takes `tools` writes them in its own way, and shows which form of call the
model was trained on. For the others, `DEFAULT_FORMAT` and `describe` are that way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlp_edge.errors import UsageError
from dlp_edge.types import Message

MAX_TOOLS = 128
MAX_ITEMS = 10_000  # values in a schema, or in the arguments of a call
MAX_DEPTH = 64  # of what is nested in them
CHOICES = ("auto", "none", "required")  # no names of tools
_NAME = re.compile(r"[A-Za-z0-9_./:-]{1,64}")
_ASKED = "Write {name, parameters} with a JSON schema of type object, or OpenAI's form of it"


@dataclass(frozen=True)
class Tool:
    """A function that the application runs for the model.

    Attributes:
        parameters: the JSON schema of its arguments, of type object.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def function(self) -> dict[str, Any]:
        """As OpenAI's interface describes a function."""
        about = {"description": self.description} if self.description else {}
        return {"name": self.name, **about, "parameters": self.parameters}


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools.

    Attributes:
        tools: those that the model is told of.
        allowed: those that it may call.
        required: whether it must call one.
        parallel: whether it may call several at once.
    """

    tools: tuple[Tool, ...]
    allowed: tuple[Tool, ...]
    required: bool
    parallel: bool


@dataclass(frozen=True)
class CallFormat:
    """How calls are written: begin + JSON + (between + JSON)* + end.

    Attributes:
        begin: blank where a call is the JSON alone.
        key: of the arguments, in `{"name": ..., KEY: {...}}`.
        between: None where there is one call only.
    """

    begin: str
    key: str
    between: str | None
    end: str

    def write(self, name: str, arguments: str) -> str:
        """The JSON of a call, the same as the grammar enforces."""
        return f'{{"name": {json.dumps(name)}, "{self.key}": {arguments}}}'


DEFAULT_FORMAT = CallFormat(
    "<tool_call>\n", "arguments", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
)


def parse_tools(tools: object, choice: object, parallel: object) -> ToolUse | None:
    """The tools of a request; None if there are none, or none may be called.

    Args:
        choice: None, "auto", "none", "required", or the name of a tool.

    Raises:
        UsageError: something is malformed, or the choice is no tool.
    """
    if tools is not None and (isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence)):
        raise UsageError(f"tools is {type(tools).__name__}, no list", "Give a list of tools")
    parsed = tuple(_parse_tool(tool) for tool in tools or ())
    if len(parsed) > MAX_TOOLS:
        raise UsageError(f"there are {len(parsed)} tools", f"Give at most {MAX_TOOLS}")
    names = [tool.name for tool in parsed]
    if len(set(names)) < len(names):
        raise UsageError("two tools have the same name", "Give each a name of its own")
    if not isinstance(parallel, bool):
        raise UsageError(f"parallel_tool_calls is {parallel!r}", "Use True or False")
    if choice is not None and not isinstance(choice, str):
        raise UsageError(f"tool_choice is {choice!r}", "Use auto, none, required or a tool's name")
    if choice in (None, "auto", "none"):
        return ToolUse(parsed, parsed, False, parallel) if parsed and choice != "none" else None
    if choice == "required" and parsed:
        return ToolUse(parsed, parsed, True, parallel)
    named = tuple(tool for tool in parsed if tool.name == choice)
    if not named:
        known = ", ".join(names) or "none"
        raise UsageError(f"tool_choice is {choice!r}, the tools are: {known}", "Name one of them")
    return ToolUse(parsed, named, True, parallel)


def _parse_tool(given: object) -> Tool:
    """A tool in OpenAI's form, or its inner part alone."""
    function = given
    if isinstance(given, Mapping) and given.get("type", "function") != "function":
        raise UsageError(f"a tool has the type {given['type']!r}", "Only functions can be called")
    if isinstance(given, Mapping) and "function" in given:
        function = given["function"]
    if not isinstance(function, Mapping):
        raise UsageError(f"{function!r} is no tool", _ASKED)
    name, description = function.get("name"), function.get("description")
    parameters = function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in CHOICES:
        raise UsageError(
            f"a tool's name is {name!r}", "Use 1 to 64 letters, digits and the characters _ . / : -"
        )
    if description is not None and not isinstance(description, str):
        raise UsageError(f"the description of {name} is no text", "Give a text, or leave it out")
    parameters = {"properties": {}} if parameters is None else parameters
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise UsageError(f"the parameters of {name} are no schema of an object", _ASKED)
    try:
        json.dumps([description, parameters], ensure_ascii=False).encode()
        _check_size(parameters)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} cannot be written as JSON ({error})", _ASKED) from error
    return Tool(name, description or "", {"type": "object", **parameters})


def describe(tools: Sequence[Tool], form: CallFormat = DEFAULT_FORMAT) -> str:
    """What a model whose template knows no tools is told of them."""
    listed = "\n".join(json.dumps(tool.function, ensure_ascii=False) for tool in tools)
    example = form.begin + form.write("NAME", "{...}") + form.end
    return f"You can call these tools:\n{listed}\nTo call one, answer with:\n{example}"


def as_plain(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation for a template that knows no tools: these in the system message, calls as
    text of the assistant, results as messages of the user."""
    plain: list[Message] = []
    results: list[str] = []  # of the calls before, which make one message
    for message in messages:
        if message["role"] == "tool":
            results.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if results:
            plain.append({"role": "user", "content": "\n".join(results)})
            results = []
        plain.append({"role": message["role"], "content": _with_calls(message)})
    if results:
        plain.append({"role": "user", "content": "\n".join(results)})
    if not tools:
        return plain
    system, rest = "", plain
    if plain[0]["role"] == "system":
        system, rest = plain[0]["content"] + "\n\n", plain[1:]
    return [{"role": "system", "content": system + describe(tools)}, *rest]


def needs_tools(message: Message) -> bool:
    """Whether a template has to know tools to write a message."""
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _with_calls(message: Message) -> str:
    form, text = DEFAULT_FORMAT, str(message["content"])
    written = [
        form.write(call["function"]["name"], json.dumps(_arguments(call), ensure_ascii=False))
        for call in message.get("tool_calls") or ()
    ]
    if not written or form.between is None:
        return text
    return "\n".join(filter(None, [text, form.begin + form.between.join(written) + form.end]))


def for_template(message: Message) -> Message:
    """A message as templates that know tools read it: arguments are objects, not text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {
        **message,
        "tool_calls": [
            {
                **call,
                "type": "function",
                "function": {"name": call["function"]["name"], "arguments": _arguments(call)},
            }
            for call in calls
        ],
    }


def check_calls(message: Message) -> None:
    """Raises UsageError unless the calls in a message are as OpenAI's interface has them."""
    calls = message.get("tool_calls")
    if calls is None:
        return
    if message["role"] != "assistant" or not isinstance(calls, (list, tuple)):
        raise UsageError("tool_calls is no list in a message of the assistant", "Give a list there")
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(
                "a message has a tool call without a name",
                'Write {"id": ..., "function": {"name": ..., "arguments": ...}}',
            )
        _arguments(call)


def _arguments(call: Mapping[str, Any]) -> Any:
    """The arguments of a call, given as JSON text or as an object."""
    given = call["function"].get("arguments", {})
    try:
        arguments = json.loads(given or "{}") if isinstance(given, str) else given
        json.dumps(arguments, ensure_ascii=False).encode()
        _check_size(arguments)
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, Mapping):
        raise UsageError(
            f"the arguments of a call of {call['function']['name']} are no JSON object",
            "Send back what the model wrote",
        )
    return arguments


def _check_size(value: object) -> None:
    """Raises ValueError for JSON with more values, or deeper nested ones, than is allowed."""
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        count += len(level)
        if not level or count > MAX_ITEMS:
            break
        inner = (each.values() if isinstance(each, Mapping) else each for each in level)
        level = [
            item
            for each in inner
            if not isinstance(each, str) and isinstance(each, Iterable)
            for item in each
        ]
    if level:
        raise ValueError(f"more than {MAX_ITEMS} values, or more than {MAX_DEPTH} levels of them")


def characters_of(messages: Sequence[Message], tools: Sequence[Tool]) -> int:
    """The characters of a conversation and its tools, without what a template adds."""
    said = sum(len(message["content"]) for message in messages)
    calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
    written = [
        json.dumps(each, ensure_ascii=False) for each in (calls, [t.function for t in tools])
    ]
    return said + sum(len(text) for text in written if text != "[]")


_PROBE = Tool("probe_tool", "Probes.", {"type": "object", "properties": {"x": {"type": "integer"}}})
_WRITTEN = re.compile(r'\{"name": "probe_tool", "(arguments|parameters)": \{"x": 1\}\}')


def learn_format(
    render: Callable[[Sequence[Message], Sequence[Tool]], str], ends_at: Callable[[str], int]
) -> CallFormat | None:
    """How a template writes calls; None if it writes none in a form that is known.

    Args:
        render: the template, up to the start of the assistant's turn.
        ends_at: where the first control token is in a text.
    """
    asked: list[Message] = [{"role": "user", "content": "Probe it."}]
    call = {
        "id": "call00000",
        "type": "function",
        "function": {"name": _PROBE.name, "arguments": {"x": 1}},
    }

    def answered(count: int) -> str:
        said: Message = {"role": "assistant", "content": "", "tool_calls": [call] * count}
        return render([*asked, said], [_PROBE])

    try:
        prompt, one = render(asked, [_PROBE]), answered(1)
    except UsageError:
        return None
    found = list(_WRITTEN.finditer(one))
    if not found or not one.startswith(prompt.rstrip()):
        return None
    begin = one[len(prompt.rstrip()) : found[0].start()].lstrip()
    rest = one[found[0].end() :]
    end = rest[: ends_at(rest)]
    if ends_at(begin) < len(begin):  # control tokens are not part of an answer's text
        return None
    try:
        two = answered(2)
        first, second = list(_WRITTEN.finditer(two))[-2:]
        between: str | None = two[first.end() : second.start()]
    except (UsageError, ValueError):
        between = None
    if between is not None and ends_at(between) < len(between):
        between = None
    return CallFormat(begin, found[0][1], between, end)
