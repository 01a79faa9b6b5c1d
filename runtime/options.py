"""What a request may ask for, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict, get_args

from dlp_edge.errors import UsageError
from dlp_edge.runtime.selection import SelectionRule, check_number
from dlp_edge.types import KvPolicy, SelectRule, WeighRule

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    top_p, top_k: restrict sampling (1.0 and 0: no restriction).
    seed: makes sampling repeatable.
    stop: strings that end the answer; they are not part of it.
    adapters: None routes; a name, names or {name: weight} pins; {} is the base model.
    kv: `keep` the cache when the fusion changes (the default), or `recompute` it, which is
        exact and costs a prefill of the history.
    wait: False raises BusyError where another request is under way, instead of waiting for it.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]
    adapters: str | Sequence[str] | Mapping[str, float] | None
    kv: KvPolicy
    wait: bool


@dataclass(frozen=True)
class Decoding:
    """The checked part of `GenerateOptions` that does not concern adapters."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    kv: KvPolicy = "keep"

    def __post_init__(self) -> None:
        check_number("max_new_tokens", self.max_new_tokens, whole=True)
        check_number("temperature", self.temperature)
        check_number("top_p", self.top_p)
        check_number("top_k", self.top_k, whole=True)
        if self.seed is not None:
            check_number("seed", self.seed, whole=True)
            if self.seed < 0:
                raise UsageError(f"seed is {self.seed}", "Choose 0 or more")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}", "Ask for at least 1")
        if self.temperature < 0:
            raise UsageError(f"temperature is {self.temperature}", "Choose 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}", "Choose 0 < top_p <= 1")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}", "Choose 0 (all) or more")
        if not all(isinstance(stop, str) and stop for stop in self.stop):
            raise UsageError(f"stop is {self.stop!r}", "Give texts that are not empty")
        if self.kv not in get_args(KvPolicy):
            raise UsageError(f"unknown KV policy {self.kv!r}", "Use keep or recompute")


def decoding_of(**options: Unpack[GenerateOptions]) -> Decoding:
    """The decoding part of a request's options, checked."""
    chosen = {key: value for key, value in options.items() if key in Decoding.__annotations__}
    chosen["stop"] = texts("stop", options.get("stop"))
    return Decoding(**chosen)  # type: ignore[arg-type]


def selection_of(default: SelectionRule, **options: Unpack[GenerateOptions]) -> SelectionRule:
    """The bundle's selection rule with a request's changes, checked."""
    keys = ("select", "p", "k", "weigh", "min_confidence")
    return replace(default, **{key: options[key] for key in keys if key in options})  # type: ignore[literal-required]


def texts(name: str, value: object) -> tuple[str, ...]:
    """One text, several or None as a tuple.

    Raises:
        UsageError: it is none of these.
    """
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise UsageError(f"{name} is {value!r}", "Give a text or a list of texts")
    return tuple(value)


def check_option_names(options: Mapping[str, object]) -> None:
    """Raises UsageError for an option that does not exist."""
    known = (*RouteOptions.__annotations__, *GenerateOptions.__annotations__)
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r}", f"Use: {', '.join(sorted(set(known)))}")
