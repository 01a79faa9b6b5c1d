"""What a request may ask for, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, get_args

from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.checks import check_number
from dlp_edge.errors import UsageError
from dlp_edge.types import KvPolicy, RouteDecision, RouteEvery, SelectRule, WeighRule

if TYPE_CHECKING:
    from typing_extensions import Unpack


Adapters = str | Sequence[str] | Mapping[str, float]
OnRoute = Callable[[RouteDecision, str], Adapters | None]
Schema = Mapping[str, Any] | str


class RouteOptions(TypedDict, total=False):
    """How adapters are picked; what is left out is the bundle's default.

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

    max_new_tokens: at most so many tokens are generated (256).
    temperature: 0 is greedy (the default); above, sampling.
    top_p, top_k, min_p: restrict sampling (1.0, 0 and 0: no restriction); see `make_sampler`.
    repetition_penalty: above 1 makes tokens less likely that prompt or answer have already.
    seed: makes sampling repeatable.
    stop: strings that end the answer; they are not part of it.
    stop_tokens: token ids that end it, besides the backbone's own.
    json_schema: the answer is JSON that follows this schema (extra `json`).
    logprobs: reports each token's log probability and so many of the most probable ones.
    adapters: None routes; a name, names or {name: weight} pins; {} is the base model.
    on_route: called with each `RouteDecision` and the text so far; adapters that it returns (as
        in `adapters`) overrule it, None lets it stand.
    route_every: `sentence` (the default), or `prompt`: the whole answer keeps its first fusion.
    inertia: what the decision before counts at a sentence start: the probabilities are
        (1 - inertia) times the router's plus inertia times those before (0.0; below 1).
    kv: `keep` the cache when the fusion changes (the default), or `recompute` it, which is
        exact and costs a prefill of the history.
    speculate: several tokens in one pass where the answer copies from what stands before it, in
        prompt or answer: the same answer, sooner (False). Not for `generate_batch`.
    wait: False raises BusyError where another request is under way, instead of waiting for it.
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
    json_schema: Schema | None
    logprobs: int | None
    adapters: Adapters | None
    on_route: OnRoute | None
    route_every: RouteEvery
    inertia: float
    kv: KvPolicy
    speculate: bool
    wait: bool


@dataclass(frozen=True)
class Decoding:
    """The checked part of `GenerateOptions` that does not concern adapters."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    json_schema: Schema | None = None
    logprobs: int | None = None
    kv: KvPolicy = "keep"
    speculate: bool = False

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, at_least=1, whole=True)
        _check("temperature", self.temperature, at_least=0)
        _check("top_p", self.top_p, at_most=1)
        if self.top_p <= 0:
            raise UsageError(f"top_p is {self.top_p}", "Choose 0 < top_p <= 1")
        _check("top_k", self.top_k, at_least=0, whole=True)
        _check("min_p", self.min_p, at_least=0, at_most=1)
        _check("repetition_penalty", self.repetition_penalty, at_least=0.1, at_most=10)
        if self.seed is not None:
            _check("seed", self.seed, at_least=0, whole=True)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, at_least=0, whole=True)
        if not all(isinstance(stop, str) and stop for stop in self.stop):
            raise UsageError(f"stop is {self.stop!r}", "Give texts that are not empty")
        if self.kv not in get_args(KvPolicy):
            raise UsageError(f"unknown KV policy {self.kv!r}", "Use keep or recompute")
        if not isinstance(self.speculate, bool):
            raise UsageError(f"speculate is {self.speculate!r}", "Use True or False")


def _check(
    name: str,
    value: object,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    whole: bool = False,
) -> None:
    """Raises UsageError unless a value is a number within limits."""
    check_number(name, value, whole=whole)
    if not at_least <= value <= at_most:  # type: ignore[operator]
        limits = f"{at_least:g} or more" if at_most == math.inf else f"at most {at_most:g}"
        if -math.inf < at_least and at_most < math.inf:
            limits = f"{at_least:g} to {at_most:g}"
        raise UsageError(f"{name} is {value}", f"Choose {limits}")


def decoding_of(**options: Unpack[GenerateOptions]) -> Decoding:
    """The decoding part of a request's options, checked."""
    chosen = {key: value for key, value in options.items() if key in Decoding.__annotations__}
    chosen["stop"] = texts("stop", options.get("stop"))
    tokens = options.get("stop_tokens", ())
    if not isinstance(tokens, Collection) or isinstance(tokens, (str, bytes)):
        raise UsageError(f"stop_tokens is {tokens!r}", "Give a list of token ids")
    for token in tokens:
        _check("a stop token", token, at_least=0, whole=True)
    chosen["stop_tokens"] = frozenset(tokens)
    return Decoding(**chosen)  # type: ignore[arg-type]


def selection_of(default: SelectionRule, **options: Unpack[GenerateOptions]) -> SelectionRule:
    """The bundle's selection rule with a request's changes, checked."""
    keys = ("select", "p", "k", "weigh", "min_confidence")
    return replace(default, **{key: options[key] for key in keys if key in options})  # type: ignore[literal-required]


def course_of(**options: Unpack[GenerateOptions]) -> tuple[RouteEvery, float]:
    """`route_every` and `inertia`, checked."""
    every, inertia = options.get("route_every", "sentence"), options.get("inertia", 0.0)
    if every not in get_args(RouteEvery):
        raise UsageError(f"route_every is {every!r}", "Use sentence or prompt")
    _check("inertia", inertia, at_least=0)
    if inertia >= 1:
        raise UsageError(f"inertia is {inertia}", 'Choose less than 1, or route_every="prompt"')
    return every, inertia


def texts(name: str, value: object) -> tuple[str, ...]:
    """One text, several or None as a tuple.

    Raises:
        UsageError: it is none of these.
    """
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise UsageError(f"{name} is {value!r}", "Give a text or a list of texts")
    items = tuple(value)
    if not all(isinstance(item, str) for item in items):
        raise UsageError(f"{name} is {value!r}", "Give a text or a list of texts")
    return items


def check_callable(name: str, value: object) -> None:
    """Raises UsageError unless a callback is one, or None."""
    if value is not None and not callable(value):
        raise UsageError(f"{name} is {value!r}", "Give a function, or leave it out")


def check_each(each: Sequence[GenerateOptions] | None, count: int) -> list[GenerateOptions]:
    """The options of each of so many prompts.

    Raises:
        UsageError: they are no list of options, or there are more or fewer.
    """
    if each is None:
        return [{} for _ in range(count)]
    if not isinstance(each, Sequence) or not all(isinstance(own, Mapping) for own in each):
        raise UsageError(f"each is {each!r}", "Give a list with one dict of options a prompt")
    if len(each) != count:
        raise UsageError(f"there are {count} prompts and options for {len(each)}", "Give one each")
    return list(each)


def check_option_names(options: Mapping[str, object]) -> None:
    """Raises UsageError for an option that does not exist."""
    known = (*RouteOptions.__annotations__, *GenerateOptions.__annotations__)
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r}", f"Use: {', '.join(sorted(set(known)))}")
