"""The filters, tests and functions of chat templates, each with its cost charged first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.runtime import Undefined
from jinja2.tests import TESTS as JINJA_TESTS
from markupsafe import escape

from dlp_edge.untrusted.template_budget import (
    MAX_ITEMS,
    HostileTemplateError,
    budget,
    limited,
    weight,
)
from dlp_edge.untrusted.template_text import call_method, joined, replaced

MAX_NUMBER_TEXT = 100  # characters of a text that is read as a number
MAX_PRECISION = 20
MAX_JSON_DEPTH = 32  # of indented JSON, which writes the indent for every item

# Filters that hand on what they are given, without reading its characters.
_HANDING_ON = (
    "abs attr count d default first items last length list map reject rejectattr reverse select"
    " selectattr"
).split()
_SORTING = "dictsort groupby max min sort unique".split()  # they copy texts in lower case
_COMPARING_TESTS = (
    "!= < <= == > >= divisibleby eq equalto ge greaterthan gt in le lessthan lower lt ne upper"
).split()
_DATE = re.compile(r"(?:%[-#]?[A-Za-z%]|[^%])*")


def as_text(value: Any) -> Any:
    """Converts a value to output text, which is charged before."""
    if isinstance(value, Undefined):
        text = str(value)
        budget.get().result(text)
        return value
    budget.get().written(value)
    return str(value)


def iterations(value: Any) -> Iterable[Any]:
    """Counts the iterations of a loop over `value`."""
    if isinstance(value, (str, list, tuple, dict, range)):
        budget.get().step(len(value))
        return value
    return _stepped(value) if isinstance(value, Iterable) else value


def read(value: Any) -> Any:
    """Charges a comparison with `value`."""
    value = _listed(value)
    budget.get().read(value)
    return value


def join_texts(values: list[Any]) -> str:
    """Concatenates values as text (the operator ~)."""
    return joined("", [str(as_text(value)) for value in values])


def _stepped(values: Iterable[Any]) -> Iterator[Any]:
    """Counts the values as they are taken."""
    for value in values:
        budget.get().step()
        yield value


def _listed(value: Any) -> Any:
    """A list of an iterator's values, which can be weighed; other values as they are."""
    if not isinstance(value, Iterator):
        return value
    values = []
    for inner in _stepped(value):
        values.append(inner)
        limited(len(values))
    return values


def _handing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        budget.get().step()
        result = function(*args, **kwargs)
        return _stepped(result) if isinstance(result, Iterator) else budget.get().result(result)

    return call


def _sorting(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_listed(value) for value in args)
        for value in args:
            if isinstance(value, str):
                limited(len(value))
            items, _ = weight(value)
            budget.get().written(value)
            budget.get().read(value, times=items.bit_length())
        result = function(*args, **kwargs)
        return _stepped(result) if isinstance(result, Iterator) else budget.get().result(result)

    return call


def _comparing(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any) -> Any:
        return function(*(read(value) for value in args))

    return call


def _by_method(name: str) -> Callable[..., Any]:
    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        return call_method(str(as_text(value)), name, *args, **kwargs)

    return call


def _list(value: Any) -> list[Any]:
    if isinstance(value, str):
        limited(len(value))
    listed = list(_listed(value))
    budget.get().result(listed)
    return listed


def _title(value: Any) -> str:
    text = str(as_text(value))
    limited(len(text))
    return str(budget.get().result(JINJA_FILTERS["title"](text)))


def _escape(value: Any) -> str:
    budget.get().written(value)
    text = str(value)
    budget.get().written(text, growth=6)
    return str(escape(text))


def _replace(value: Any, old: str, new: str, count: int | None = None) -> Any:
    text = replaced(
        str(as_text(value)), str(as_text(old)), str(as_text(new)), -1 if count is None else count
    )
    return budget.get().result(text)


def _join(values: Iterable[Any], d: str = "", attribute: str | None = None) -> Any:
    if attribute is not None:
        values = [value.get(attribute, "") for value in values if isinstance(value, Mapping)]
    texts = [str(as_text(value)) for value in iterations(values)]
    return budget.get().result(joined(str(as_text(d)), texts))


def _number(function: Callable[..., Any]) -> Callable[..., Any]:
    """`int` and `float`, which give their default for a long text."""

    def call(value: Any, default: Any = 0, *args: Any, **kwargs: Any) -> Any:
        budget.get().step()
        if isinstance(value, str) and len(value) > MAX_NUMBER_TEXT:
            return default
        return function(value, default, *args, **kwargs)

    return call


def _round(value: float, precision: int = 0, method: str = "common") -> Any:
    budget.get().step()
    if not isinstance(precision, int) or abs(precision) > MAX_PRECISION:
        raise HostileTemplateError("the chat template rounds to too many digits")
    return JINJA_FILTERS["round"](value, precision, method)


def _sum(values: Iterable[Any], attribute: str | None = None, start: float = 0) -> Any:
    numbers = [*_listed(iter(values)), start]
    if attribute is not None:
        numbers = [*(number[attribute] for number in numbers[:-1]), start]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise HostileTemplateError("the chat template sums what are no numbers")
    budget.get().read(numbers)
    return sum(numbers)


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
    # A character may become \u0000, and a pair of these beyond the first 65,536.
    budget.get().written(value, growth=6 if isinstance(value, str) else 3)
    if indent is not None:
        _check_depth(value)
        budget.get().produce(weight(value)[0] * indent * MAX_JSON_DEPTH)
    return str(
        budget.get().result(
            json.dumps(
                value,
                ensure_ascii=ensure_ascii,
                indent=indent,
                separators=separators,
                sort_keys=sort_keys,
            )
        )
    )


def _check_depth(value: Any) -> None:
    """Raises HostileTemplateError for values nested deeper than MAX_JSON_DEPTH."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner = (list(v.values()) if isinstance(v, Mapping) else v for v in level)
        level = [item for items in inner if isinstance(items, (list, tuple)) for item in items]
        if not level:
            return
    raise HostileTemplateError("the chat template indents too deep a list")


def _range(*args: Any) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_ITEMS:
        raise HostileTemplateError("the chat template creates too long a list")
    budget.get().step(len(numbers))
    return numbers


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    budget.get().step(sum(weight(value)[0] for value in args))
    result = dict(*args, **kwargs)
    budget.get().result(result)
    return result


def _now(form: str) -> str:
    if len(form) > 100 or not _DATE.fullmatch(form):
        raise HostileTemplateError("the chat template uses an unsupported date format")
    return datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise TemplateError(message)


FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _handing_on(JINJA_FILTERS[name]) for name in _HANDING_ON},
    **{name: _sorting(JINJA_FILTERS[name]) for name in _SORTING},
    **{name: _by_method(name) for name in ("capitalize", "lower", "upper")},
    "e": _escape,
    "escape": _escape,
    "float": _number(JINJA_FILTERS["float"]),
    "int": _number(JINJA_FILTERS["int"]),
    "join": _join,
    "list": _list,
    "replace": _replace,
    "round": _round,
    "safe": as_text,
    "string": as_text,
    "sum": _sum,
    "title": _title,
    "tojson": _to_json,
    "trim": _by_method("strip"),
}
_tests: dict[str, Any] = dict(JINJA_TESTS)
TESTS: dict[str, Callable[..., Any]] = {
    **_tests,
    **{name: _comparing(_tests[name]) for name in _COMPARING_TESTS},
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dict": _dict,
    "range": _range,
    "raise_exception": _refuse,
    "strftime_now": _now,
}
