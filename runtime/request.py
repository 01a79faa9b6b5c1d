"""A request's options, parsed and checked once into one frozen value."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.bundle.routed_folder import RoutedManifest
from dlp_edge.checks import check_number
from dlp_edge.errors import UsageError
from dlp_edge.runtime.options import (
    GenerateOptions,
    OnRoute,
    Schema,
    check_callable,
    check_each,
    check_names,
    check_option_names,
    parse_weights,
    texts,
)
from dlp_edge.runtime.text.tools import ToolUse, parse_tools
from dlp_edge.types import KvPolicy, Message, RequestsMode, RouteEvery

SEED_BITS = 32  # of a seed that is drawn: short enough to note down


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; see `GenerateOptions`."""

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
    repetition_stop: bool = True

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
        for name in ("speculate", "repetition_stop"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}", "Use True or False")


@dataclass(frozen=True)
class RoutingSchedule:
    """When the router is asked, and how much its last decision counts; see `GenerateOptions`."""

    every: RouteEvery = "sentence"
    inertia: float = 0.0

    def __post_init__(self) -> None:
        if self.every not in get_args(RouteEvery):
            raise UsageError(f"route_every is {self.every!r}", "Use sentence or prompt")
        _check("inertia", self.inertia, at_least=0)
        if self.inertia >= 1:
            raise UsageError(
                f"inertia is {self.inertia}", 'Choose less than 1, or route_every="prompt"'
            )


@dataclass(frozen=True)
class Routing:
    """Who writes the sentences.

    Attributes:
        pinned: adapter -> weight; None leaves it to the router.
        forbidden: adapters that the router must not pick.
        on_route: the application's say in each decision.
    """

    pinned: dict[str, float] | None
    rule: SelectionRule
    forbidden: frozenset[str]
    on_route: OnRoute | None
    schedule: RoutingSchedule


@dataclass(frozen=True)
class RequestOptions:
    """`GenerateOptions`, parsed.

    Attributes:
        wait: whether to wait for the request that is running.
        requests: how several requests in one prompt are answered.
        tools: None if the model may call none.
        raw: whether the prompt is continued as it is.
    """

    decoding: Decoding
    routing: Routing
    wait: bool
    requests: RequestsMode
    tools: ToolUse | None = None
    raw: bool = False


def parse_options(options: Mapping[str, Any], manifest: RoutedManifest) -> RequestOptions:
    """The options of a request to a bundle; what is left out is the default.

    Raises:
        UsageError: an option is unknown or wrong, or an adapter is not in the bundle.
    """
    check_option_names(options)
    requests = options.get("requests", "together")
    if requests not in get_args(RequestsMode):
        raise UsageError(f"requests is {requests!r}", f"Use {', '.join(get_args(RequestsMode))}")
    raw = options.get("raw", False)
    if not isinstance(raw, bool):
        raise UsageError(f"raw is {raw!r}", "Use True or False")
    tools = parse_tools(
        options.get("tools"), options.get("tool_choice"), options.get("parallel_tool_calls", True)
    )
    if tools is not None and (raw or requests == "apart"):
        other = "raw" if raw else 'requests="apart"'
        raise UsageError(f"tools do not go with {other}", "Leave out one of them")
    return RequestOptions(
        _parse_decoding(options),
        _parse_routing(options, manifest),
        options.get("wait", True),
        requests,
        tools,
        raw,
    )


def seed_of(decoding: Decoding) -> int | None:
    """The seed that is asked for, or a new one; None for a greedy answer."""
    if decoding.temperature == 0:
        return None
    return secrets.randbits(SEED_BITS) if decoding.seed is None else decoding.seed


def with_one_seed(options: RequestOptions) -> RequestOptions:
    """The options with a seed that several answers share, so that one number repeats them all."""
    return replace(options, decoding=replace(options.decoding, seed=seed_of(options.decoding)))


def parse_batch(
    prompts: Sequence[str | Sequence[Message]],
    each: Sequence[GenerateOptions] | None,
    common: GenerateOptions,
    manifest: RoutedManifest,
) -> list[RequestOptions]:
    """The options of each prompt of a batch: its own override the common ones.

    Raises:
        UsageError: as `parse_options`; the prompts are no list, `each` does not match it, or one
            asks for speculation.
    """
    if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
        raise UsageError(
            f"the prompts are {type(prompts).__name__}, no list", "Give a list of prompts"
        )
    parsed = [parse_options({**common, **own}, manifest) for own in check_each(each, len(prompts))]
    if any(options.decoding.speculate for options in parsed):
        raise UsageError("a batch cannot speculate", "Leave it out, or use generate")
    if any(options.requests == "apart" for options in parsed):
        raise UsageError(
            "a batch answers each prompt whole", 'Leave out requests="apart", or use generate'
        )
    return parsed


def parse_schedule(options: Mapping[str, Any]) -> RoutingSchedule:
    """`route_every` and `inertia`."""
    return RoutingSchedule(options.get("route_every", "sentence"), options.get("inertia", 0.0))


def _parse_decoding(options: Mapping[str, Any]) -> Decoding:
    chosen = {key: value for key, value in options.items() if key in Decoding.__annotations__}
    chosen["stop"] = texts("stop", options.get("stop"))
    tokens = options.get("stop_tokens", ())
    if not isinstance(tokens, Collection) or isinstance(tokens, (str, bytes)):
        raise UsageError(f"stop_tokens is {tokens!r}", "Give a list of token ids")
    for token in tokens:
        _check("a stop token", token, at_least=0, whole=True)
    chosen["stop_tokens"] = frozenset(tokens)
    return Decoding(**chosen)


def _parse_routing(options: Mapping[str, Any], manifest: RoutedManifest) -> Routing:
    names = [entry.name for entry in manifest.adapters]
    rule = manifest.router.selection if manifest.router else SelectionRule()
    changes = {key: options[key] for key in SelectionRule.__annotations__ if key in options}
    check_callable("on_route", options.get("on_route"))
    forbidden = texts("forbid", options.get("forbid"))
    check_names(forbidden, names)
    adapters = options.get("adapters")
    if adapters is None and not names:
        adapters = {}  # nothing to route to
    return Routing(
        None if adapters is None else parse_weights(adapters, names),
        replace(rule, **changes),
        frozenset(forbidden),
        options.get("on_route"),
        parse_schedule(options),
    )


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
