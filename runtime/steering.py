"""Who decides the fusion of a sentence: the router, or the application that pinned it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dlp_edge.bundle import ROUTER_TOKENIZER, Bundle
from dlp_edge.errors import UsageError
from dlp_edge.manifest import Manifest
from dlp_edge.runtime.fusion import check_names, parse_weights
from dlp_edge.runtime.options import GenerateOptions, OnRoute, check_callable, selection_of, texts
from dlp_edge.runtime.router import Router
from dlp_edge.runtime.selection import SelectionRule, select, weigh
from dlp_edge.types import RouteDecision

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Pinned:
    """Always these weights; nothing is routed."""

    weights: dict[str, float]


@dataclass(frozen=True)
class Routed:
    """The router decides at the prompt and at every sentence start.

    Attributes:
        forbidden: labels whose probability is set to zero and shared among the others.
        overrule: the application's say in a decision, and the names that it may use.
    """

    router: Router
    rule: SelectionRule
    forbidden: frozenset[str] = frozenset()
    overrule: OnRoute | None = None
    names: tuple[str, ...] = ()

    def decide(self, prompt: str, generated: str = "") -> RouteDecision:
        """Reads the user's text and the text generated so far, and picks adapters."""
        found = self.router.judge(prompt, generated)
        allowed = {n: y for n, y in found.probabilities.items() if n not in self.forbidden}
        total = sum(allowed.values())
        probabilities = {name: y / total for name, y in allowed.items()} if total > 0 else {}
        confidence = (1 - found.doubt) * max(probabilities.values(), default=0.0)
        sure = confidence >= self.rule.min_confidence
        selected = select(probabilities, self.rule) if sure else ()
        decision = RouteDecision(
            probabilities=probabilities,
            selected=selected,
            weights=weigh(probabilities, selected, self.rule.weigh),
            confidence=confidence,
            doubt=found.doubt,
        )
        adapters = self.overrule(decision, generated) if self.overrule else None
        if adapters is None:
            return decision
        return replace(decision, weights=parse_weights(adapters, self.names))


Steering = Pinned | Routed


def check_prompt(text: object) -> None:
    """Raises UsageError unless a prompt is text that says something and can be encoded."""
    if not isinstance(text, str):
        raise UsageError(f"the prompt is {type(text).__name__}, not text", "Give it as text")
    if not text.strip():
        raise UsageError("the prompt is empty", "Give it some text")
    check_encoding(text)


def check_encoding(text: str) -> None:
    """Raises UsageError for text that holds half a surrogate pair: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid Unicode", "Check its encoding") from error


def load_router(bundle: Bundle) -> Router | None:
    """The bundle's router; None where it has none."""
    entry = bundle.manifest.router
    if entry is None:
        return None
    graph, head = bundle.router()
    return Router(graph, head, bundle.tokenizer(ROUTER_TOKENIZER), entry.settings)


def route_with(
    router: Router | None, manifest: Manifest, **options: Unpack[GenerateOptions]
) -> Routed:
    """Steering by the bundle's router under a request's options.

    Raises:
        UsageError: the bundle has no router, or an option is wrong.
    """
    rule, forbidden = check_routing(manifest, **options)
    if router is None:
        names = [entry.name for entry in manifest.adapters]
        example = f", for example {names[0]!r}" if names else ""
        raise UsageError(
            "the bundle has no router to pick adapters", f"Pin them with adapters=...{example}"
        )
    known = tuple(entry.name for entry in manifest.adapters)
    return Routed(router, rule, forbidden, options.get("on_route"), known)


def check_routing(
    manifest: Manifest, **options: Unpack[GenerateOptions]
) -> tuple[SelectionRule, frozenset[str]]:
    """The selection rule and the forbidden adapters of a request.

    Raises:
        UsageError: an option is wrong, or an adapter is not in the bundle.
    """
    default = manifest.router.selection if manifest.router else SelectionRule()
    check_callable("on_route", options.get("on_route"))
    forbidden = texts("forbid", options.get("forbid"))
    check_names(forbidden, [entry.name for entry in manifest.adapters])
    return selection_of(default, **options), frozenset(forbidden)
