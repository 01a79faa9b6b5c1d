"""What a request may ask for, as callers write it (`request.py` has it parsed)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypedDict

from dlp_edge.checks import check_number
from dlp_edge.errors import UsageError
from dlp_edge.types import (
    KvPolicy,
    RequestsMode,
    RouteDecision,
    RouteEvery,
    SelectRule,
    WeighRule,
)

Adapters = str | Sequence[str] | Mapping[str, float]
OnRoute = Callable[[RouteDecision, str], Adapters | None]
Schema = Mapping[str, Any] | str | type
ToolSpec = Mapping[str, Any]

# What the options are called elsewhere.
_OTHER_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "do_sample": "temperature",
    "repeat_penalty": "repetition_penalty",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "stop_token_ids": "stop_tokens",
    "response_format": "json_schema",
    "top_logprobs": "logprobs",
    "adapter": "adapters",
    "functions": "tools",
}
LARGEST_WEIGHT = 1e3  # a larger one overflows the logits


class RouteOptions(TypedDict, total=False):
    """How the router picks adapters; defaults are the bundle's.

    select, p, k, weigh, min_confidence: see `SelectionRule`.
    forbid: adapters that the router must not pick.
    """

    select: SelectRule
    p: float
    k: int
    weigh: WeighRule
    min_confidence: float
    forbid: Sequence[str]


class GenerateOptions(RouteOptions, total=False):
    """Keyword arguments of `Runtime.generate` and `Runtime.stream`.

    max_new_tokens: maximum new tokens (default 256).
    temperature: 0 (default) is greedy; above 0, sampling.
    top_p, top_k, min_p: sampling filters (defaults 1.0, 0 and 0: off); see `make_sampler`.
    repetition_penalty: above 1 penalises tokens that occur in prompt or answer (default 1.0).
    seed: makes sampling reproducible.
    stop: strings that end the answer, and are not part of it.
    repetition_stop: the answer ends where up to four sentences come three times in a row, word
        for word; with tools, also where it makes the same call again, and strings that repeat their
        end are closed (True).
    stop_tokens: token ids that end it, besides the backbone's own.
    json_schema: the answer is JSON that follows this schema, or this Pydantic class's (extra
        `json`).
    tools: functions that the model may call instead of answering, or besides (extra `json`): each
        {"name", "description"?, "parameters"}, or in OpenAI's form; `parameters` is a JSON schema
        that the arguments then follow. See `Reply.tool_calls`.
    tool_choice: `auto` (default) leaves it to the model, `required` makes it call one, a name makes
        it call that one, and `none` hides the tools.
    parallel_tool_calls: whether an answer may hold several calls (default True).
    logprobs: report each token's log probability and those of this many top tokens.
    adapters: None routes; a name, names or {name: weight} pins; {} is the base model.
    on_route: called with each `RouteDecision` and the text so far; adapters that it returns (as
        in `adapters`) override the decision, None accepts it.
    route_every: `sentence` (default), or `prompt`: one fusion for the whole answer.
    inertia: the weight of the previous decision at a sentence start: probabilities are
        (1 - inertia) times the router's plus inertia times the previous ones (default 0; < 1).
    kv: `keep` the KV cache when the fusion changes (default), or `recompute` it: exact, at the
        cost of a prefill of the history.
    speculate: prompt-lookup decoding: several tokens per pass where the answer copies earlier
        text; the answer is the same (default False). Not for `generate_batch`.
    requests: how several requests in one prompt are answered. `together` (default): as one text.
        `apart`: the bundle's request splitter takes the prompt apart, and each request is answered
        as if asked alone, side by side in one batch, its answer following that of the request
        before. `auto`: likewise, but a request that leans on the one before ("say that like a
        pirate") is answered after it, as a further turn; and a prompt under a `json_schema` or
        pinned `adapters` is answered whole. Limits, stop strings and schemas hold for each request.
    raw: the prompt, a text, is continued as it is: no chat template, and special tokens in it count
        (default False).
    wait: False raises BusyError instead of waiting for room beside running requests (default
        True).
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    stop_tokens: Sequence[int]
    repetition_stop: bool
    json_schema: Schema | None
    tools: Sequence[ToolSpec] | None
    tool_choice: str | None
    parallel_tool_calls: bool
    logprobs: int | None
    adapters: Adapters | None
    on_route: OnRoute | None
    route_every: RouteEvery
    inertia: float
    kv: KvPolicy
    speculate: bool
    requests: RequestsMode
    raw: bool
    wait: bool


def texts(name: str, value: object) -> tuple[str, ...]:
    """A text, several texts or None, as a tuple.

    Raises:
        UsageError: it is something else.
    """
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise UsageError(f"{name} is {value!r}", "Give a text or a list of texts")
    items = tuple(value)
    if not all(isinstance(item, str) for item in items):
        raise UsageError(f"{name} is {value!r}", "Give a text or a list of texts")
    return items


def parse_weights(adapters: Adapters, known: Sequence[str]) -> dict[str, float]:
    """The weights that an application pins: a name, names (weight 1 each) or name -> weight.

    Raises:
        UsageError: a name that is no adapter of the bundle, or a weight that is not finite.
    """
    if isinstance(adapters, Mapping):
        weights = dict(adapters)
    else:
        weights = dict.fromkeys(texts("adapters", adapters), 1.0)
    check_names(weights, known)
    for name, weight in weights.items():
        check_number(f"the weight of {name}", weight)
        if abs(weight) > LARGEST_WEIGHT:
            raise UsageError(
                f"the weight of {name} is {weight}", f"Stay within +-{LARGEST_WEIGHT:g}"
            )
    return {name: float(weight) for name, weight in weights.items()}


def check_names(names: Mapping[str, float] | Sequence[str], known: Sequence[str]) -> None:
    """Raises UsageError for a name that is no adapter of the bundle."""
    for name in names:
        if name not in known:
            raise UsageError(
                f"the bundle has no adapter {name!r}",
                f"It has: {', '.join(known)}" if known else "It has no adapters",
            )


def check_callable(name: str, value: object) -> None:
    """Raises UsageError unless the value is callable or None."""
    if value is not None and not callable(value):
        raise UsageError(f"{name} is {value!r}", "Give a function, or leave it out")


def check_each(each: Sequence[GenerateOptions] | None, count: int) -> list[GenerateOptions]:
    """The options of each of `count` prompts.

    Raises:
        UsageError: not a list of dicts, or not one per prompt.
    """
    if each is None:
        return [{} for _ in range(count)]
    if not isinstance(each, Sequence) or not all(isinstance(own, Mapping) for own in each):
        raise UsageError(f"each is {each!r}", "Give a list with one dict of options a prompt")
    if len(each) != count:
        raise UsageError(f"there are {count} prompts and options for {len(each)}", "Give one each")
    return list(each)


def check_option_names(options: Mapping[str, object]) -> None:
    """Raises UsageError for an unknown option."""
    known = sorted({*RouteOptions.__annotations__, *GenerateOptions.__annotations__})
    for name in options:
        if name not in known:
            meant = _OTHER_NAMES.get(name) or next(iter(get_close_matches(name, known, 1)), None)
            remedy = f"Use: {', '.join(known)}" if meant is None else f"Write {meant}"
            raise UsageError(f"unknown option {name!r}", remedy)
