"""Runs untrusted chat templates in Jinja's sandbox, with limits on time, size and steps.

Jinja's sandbox keeps a template away from Python's internals, but lets it write 200 MB or loop for
a day. So everything a template can repeat or enlarge counts against a budget: loop iterations,
calls and filters, output, and lists. Operations that enlarge a value in one step (`*` and `%`
on text, `**`, formatting, padding) are not available.

Limitation: the time is checked between steps, so a template can exceed the time limit by the
duration of one step on values within these limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from time import perf_counter
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2.0
MAX_STEPS = 2_000_000
MAX_CHARACTERS = 16 << 20
MAX_ITEMS = 100_000  # of a list or dict, including nested items
MAX_SOURCE = 256 << 10

_FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float groupby int items join last"
    " length list lower map max min reject rejectattr replace reverse round safe select selectattr"
    " sort string sum title trim unique upper wordcount"
).split()
_METHODS = {
    str: (
        "capitalize count endswith find index isalnum isalpha isdigit islower isnumeric isspace"
        " istitle isupper join lower lstrip removeprefix removesuffix replace rfind rindex"
        " rpartition partition rsplit rstrip split splitlines startswith strip swapcase title upper"
    ).split(),
    dict: "get items keys values".split(),
    list: "count index".split(),
    tuple: "count index".split(),
}
_DATE = re.compile(r"(?:%[-#]?[A-Za-z%]|[^%])*")


class HostileTemplateError(TemplateError):
    """The template itself, not the messages, exceeds its budget."""


class Budget:
    """The remaining steps, characters and time of one rendering."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._characters = MAX_CHARACTERS
        self._end = perf_counter() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        """Counts steps. Raises HostileTemplateError when steps or time run out."""
        self._steps -= count
        if self._steps < 0 or perf_counter() > self._end:
            raise HostileTemplateError("the chat template runs too long")

    def text(self, length: int) -> None:
        """Counts characters produced."""
        self.step()
        self._characters -= length
        if self._characters < 0:
            raise HostileTemplateError("the chat template produces too much text")

    def value(self, value: Any) -> Any:
        """Counts a value and returns it."""
        if isinstance(value, str):
            self.text(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.step(_items(value))
        else:
            self.step()
        return value


_budget: ContextVar[Budget] = ContextVar("budget")


class SandboxedEnvironment(ImmutableSandboxedEnvironment):
    """A Jinja environment whose templates run within the `Budget` set by `render`."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            optimized=False,  # no constant folding: compilation has no budget
            finalize=_finalize,
        )
        self.filters = {name: _counted(self.filters[name]) for name in _FILTERS}
        self.filters |= {"tojson": _counted(_to_json), "_iterations": _iterations, "_text": _text}
        self.filters |= {"_joined": _joined, "_value": lambda value: _budget.get().value(value)}
        self.filters["replace"] = _counted(_replace)
        self.filters["join"] = _counted(_join)
        self.globals = {
            "namespace": self.globals["namespace"],
            "dict": _counted(dict),
            "range": _range,
            "raise_exception": _refuse,
            "strftime_now": _now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _count_all(super()._parse(source, name, filename))

    def call(self, context: Context, callee: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        owner = getattr(callee, "__self__", None)
        if isinstance(owner, str) and callee.__name__ in ("replace", "join"):
            for name in ("_loop_vars", "_block_vars"):  # passed by Jinja for its own functions
                kwargs.pop(name, None)
        if isinstance(owner, str) and callee.__name__ == "replace":
            return budget.value(_replace(owner, *args, **kwargs))
        if isinstance(owner, str) and callee.__name__ == "join":
            return budget.value(_join(args[0], owner))
        return budget.value(super().call(context, callee, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, known in _METHODS.items():
            if isinstance(obj, kind):
                return attr in known
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Disables str.format: a width alone can exhaust memory."""

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, type):
            return obj is self.globals["namespace"]
        return super().is_safe_callable(obj)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if operator == "+" and isinstance(left, (str, list, tuple)):
            if isinstance(right, (str, list, tuple)):
                budget.text(len(left) + len(right))
            return budget.value(super().call_binop(context, operator, left, right))
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if not numbers or operator == "**" or max(abs(left), abs(right)) > 1e15:
            raise HostileTemplateError(
                f"the chat template uses {operator} on a large number or a non-number"
            )
        budget.step()
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _budget.get().step()
        if isinstance(argument, slice) and isinstance(obj, (str, list, tuple)):
            _budget.get().text(len(obj))
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _budget.get().step()
        return super().getattr(obj, attribute)


def render(template: Template, **values: Any) -> str:
    """Renders a template within a new budget.

    Raises:
        HostileTemplateError: the template exceeds its budget.
        Exception: any other error in the template.
    """
    token = _budget.set(Budget())
    try:
        return template.render(**values)
    finally:
        _budget.reset(token)


def _count_all(template: nodes.Template) -> nodes.Template:
    """Instruments everything that a template can repeat or enlarge."""
    for loop in template.find_all(nodes.For):
        if loop.recursive:
            raise TemplateError("recursive loops are not supported")
        loop.iter = _filtered(loop.iter, "_iterations")
    for node in template.find_all((nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)):
        raise TemplateError(f"{type(node).__name__.lower()} is not supported in a chat template")
    for output in template.find_all(nodes.Output):
        output.nodes = [
            _filtered(nodes.Const(part.data), "_text")
            if isinstance(part, nodes.TemplateData)
            else part
            for part in output.nodes
        ]
    _replace_inside(template)
    return template


def _replace_inside(node: nodes.Node) -> None:
    """Replaces concatenations and list, tuple and dict literals below a node by counted ones."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            _replace_inside(value)
            setattr(node, name, _counted_form(value))
        elif isinstance(value, list):
            for inner in value:
                if isinstance(inner, nodes.Node):
                    _replace_inside(inner)
            setattr(node, name, [_counted_form(inner) for inner in value])


def _counted_form(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _filtered(nodes.List(node.nodes), "_joined")
    loads = isinstance(node, (nodes.List, nodes.Dict)) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    )
    return _filtered(node, "_value") if loads else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno or 1)


@pass_context  # also prevents constant folding while compiling
def _finalize(context: Context, value: Any) -> Any:
    return _as_text(value)


def _as_text(value: Any) -> Any:
    """Converts a value to output text; containers are counted before conversion."""
    if not isinstance(value, (str, int, float, Undefined, type(None))):
        _budget.get().step(_items(value))
    text = value if isinstance(value, Undefined) else str(value)
    _budget.get().text(len(str(text)))
    return text


def _items(value: Any) -> int:
    """Counts the values in a container at all depths. Raises HostileTemplateError if too many."""
    count, pending = 0, [value]
    while pending:
        inner = pending.pop()
        count += 1
        if isinstance(inner, Mapping):
            pending += inner.values()
        elif isinstance(inner, (list, tuple)):
            pending += inner
        if count + len(pending) > MAX_ITEMS:
            raise HostileTemplateError("the chat template creates too long a list")
    return count


def _iterations(value: Any) -> Iterable[Any]:
    """Counts the iterations of a loop over `value`."""
    if isinstance(value, (str, list, tuple, dict, range)):
        _budget.get().step(len(value))
        return value
    return _stepped(value) if isinstance(value, Iterable) else value


def _stepped(values: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for value in values:
        budget.step()
        yield value


def _text(text: str) -> str:
    return text  # `_finalize` counts it; the filter prevents constant folding


def _joined(values: list[Any]) -> str:
    return "".join(str(_as_text(value)) for value in values)


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a filter so that its call, arguments and result are counted."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        for value in args:
            if isinstance(value, (list, tuple, dict)):
                budget.step(_items(value))
        result = function(*args, **kwargs)
        return _stepped(result) if isinstance(result, Iterator) else budget.value(result)

    return call


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _budget.get().text(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return str(text.replace(old, new, -1 if count is None else count))


def _join(values: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        values = [value.get(attribute, "") for value in values if isinstance(value, Mapping)]
    texts = [str(_as_text(value)) for value in _stepped(values)]
    _budget.get().text(len(texts) * len(str(between)))
    return str(between).join(texts)


def _range(*args: Any) -> range:
    numbers = range(*args)
    _budget.get().step(len(numbers))
    if len(numbers) > MAX_ITEMS:
        raise HostileTemplateError("the chat template creates too long a list")
    return numbers


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` of transformers: plain JSON, where Jinja's own escapes HTML."""
    if indent is not None and not 0 <= indent <= 8:
        raise HostileTemplateError("the chat template uses too large an indent")
    if separators is not None and max(map(len, separators)) > 4:
        raise HostileTemplateError("the chat template uses too long a separator")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _now(form: str) -> str:
    if len(form) > 100 or not _DATE.fullmatch(form):
        raise HostileTemplateError("the chat template uses an unsupported date format")
    return datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise TemplateError(message)
