"""Runs untrusted chat templates in Jinja's sandbox, with limits on time, size and steps.

Jinja's sandbox keeps a template away from Python's internals, but lets it write 200 MB or loop for
a day. So everything a template can repeat or enlarge is charged to a budget before it is done:
loop iterations, calls and filters, comparisons, output, and lists. Operations that enlarge a value
in one step (`*` and `%` on text, `**`, formatting, padding) are not available, and searches that
take the product of two lengths are replaced (`template_text.py`).

The time is checked between operations. Each takes at most a fraction of a second, as it is
within the budget for reading and writing, so signals and cancellation are served too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.lexer import Token, TokenStream
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dlp_edge.untrusted.template_budget import Budget, HostileTemplateError, budget
from dlp_edge.untrusted.template_functions import (
    FILTERS,
    FUNCTIONS,
    TESTS,
    as_text,
    iterations,
    join_texts,
    read,
)
from dlp_edge.untrusted.template_text import METHODS, call_method

MAX_SOURCE = 256 << 10
MAX_TOKENS = 20_000  # of the source; the longest real templates have 5,000
_LARGEST = 1e15  # of a number in arithmetic

# Other files; blocks, whose code repeats all names around them; escaping, which lengthens a text
# where it is used.
_UNSUPPORTED = (
    nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.Block,
    nodes.EvalContextModifier,
)  # fmt: skip

_METHODS = {
    str: METHODS,
    dict: frozenset("get items keys values".split()),
    list: frozenset("count index".split()),
    tuple: frozenset("count index".split()),
}


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
        self.filters = {
            **FILTERS,
            "_iterations": iterations,
            "_joined": join_texts,
            "_read": read,
            "_sliced": _sliced,
            "_step": lambda value: budget.get().step(),
            "_text": _text,
            "_value": lambda value: budget.get().result(value),
        }
        self.tests = dict(TESTS)
        self.globals = {"namespace": self.globals["namespace"], **FUNCTIONS}

    def _tokenize(
        self, source: str, name: str | None, filename: str | None = None, state: str | None = None
    ) -> TokenStream:
        """Limits the source's tokens: compiling takes 10 KB of memory for each."""
        return TokenStream(
            _limited(super()._tokenize(source, name, filename, state)), name, filename
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _count_all(super()._parse(source, name, filename))

    def call(self, context: Context, callee: Any, *args: Any, **kwargs: Any) -> Any:
        budget.get().step()
        owner = getattr(callee, "__self__", None)
        if isinstance(owner, str):
            for name in ("_loop_vars", "_block_vars"):  # passed by Jinja for its own functions
                kwargs.pop(name, None)
            return call_method(owner, callee.__name__, *args, **kwargs)
        budget.get().read(owner if isinstance(owner, (list, tuple)) else None, *args)
        return budget.get().result(super().call(context, callee, *args, **kwargs))

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
        texts = isinstance(left, str) and isinstance(right, str)
        if operator == "+" and (texts or isinstance(left, (list, tuple))):
            for value in (left, right):
                budget.get().result(value)
            return budget.get().result(super().call_binop(context, operator, left, right))
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if not numbers or operator == "**" or max(abs(left), abs(right)) > _LARGEST:
            raise HostileTemplateError(
                f"the chat template uses {operator} on a large number or a non-number"
            )
        budget.get().step()
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        budget.get().step()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        budget.get().step()
        return super().getattr(obj, attribute)


def render(template: Template, **values: Any) -> str:
    """Renders a template within a new budget.

    Raises:
        HostileTemplateError: the template exceeds its budget.
        Exception: any other error in the template.
    """
    token = budget.set(Budget())
    try:
        return template.render(**values)
    finally:
        budget.reset(token)


def _count_all(template: nodes.Template) -> nodes.Template:
    """Instruments everything that a template can repeat or enlarge."""
    for loop in template.find_all(nodes.For):
        if loop.recursive:
            raise TemplateError("recursive loops are not supported")
        loop.iter = _filtered(loop.iter, "_iterations")
        loop.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(None), "_step")))
    for node in template.find_all(_UNSUPPORTED):
        raise TemplateError(f"{type(node).__name__.lower()} is not supported in a chat template")
    for output in template.find_all(nodes.Output):
        output.nodes = [
            _filtered(nodes.Const(part.data), "_text")
            if isinstance(part, nodes.TemplateData)
            else part
            for part in output.nodes
        ]
    for comparison in template.find_all(nodes.Compare):
        comparison.expr = _filtered(comparison.expr, "_read")
        for operand in comparison.ops:
            operand.expr = _filtered(operand.expr, "_read")
    _replace_inside(template)
    return template


def _limited(stream: TokenStream) -> Iterator[Token]:
    """Raises TemplateError for more than MAX_TOKENS."""
    for count, token in enumerate(stream):
        if count > MAX_TOKENS:
            raise TemplateError(f"more than {MAX_TOKENS} tokens")
        yield token


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
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        # Jinja slices without asking the environment.
        bounds = [
            part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)
        ]
        return nodes.Filter(node.node, "_sliced", bounds, [], None, None, lineno=node.lineno)
    loads = isinstance(node, (nodes.List, nodes.Dict)) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    )
    return _filtered(node, "_value") if loads else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno or 1)


@pass_context  # also prevents constant folding while compiling
def _finalize(context: Context, value: Any) -> Any:
    return as_text(value)


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    part = slice(start, stop, step)
    if isinstance(value, (str, list, tuple)):
        kept = len(range(*part.indices(len(value))))
        budget.get().produce(kept * (1 if isinstance(value, str) and value.isascii() else 8))
    return value[part]


def _text(text: str) -> str:
    return text  # `_finalize` counts it; the filter prevents constant folding
