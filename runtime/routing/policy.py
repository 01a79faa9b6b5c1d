"""Who decides the fusion of a sentence: the router, or the application that pinned it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dlp_edge.bundle.bundle import ROUTER_TOKENIZER, Bundle
from dlp_edge.bundle.manifest import Manifest, SelectionRule
from dlp_edge.errors import BundleError, RouterError, UsageError
from dlp_edge.runtime.fusion.copying import check_names, parse_weights
from dlp_edge.runtime.options import (
    GenerateOptions,
    OnRoute,
    check_callable,
    course_of,
    selection_of,
    texts,
)
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.routing.selection import select, weigh
from dlp_edge.types import RouteDecision, RouteEvery

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Pinned:
    """Always these weights; nothing is routed."""

    weights: dict[str, float]

    def weights_for(self, prompt: str) -> dict[str, float]:
        """The fusion that an answer to the prompt begins with."""
        return self.weights


@dataclass(frozen=True)
class Routed:
    """The router decides at the prompt and at every sentence start.

    Attributes:
        forbidden: labels whose probability is set to zero and shared among the others.
        overrule: the application's say in a decision, and the names that it may use.
        every, inertia: see `GenerateOptions`.
    """

    router: Router
    rule: SelectionRule
    forbidden: frozenset[str] = frozenset()
    overrule: OnRoute | None = None
    names: tuple[str, ...] = ()
    every: RouteEvery = "sentence"
    inertia: float = 0.0

    def decide(
        self, prompt: str, generated: str = "", before: RouteDecision | None = None
    ) -> RouteDecision:
        """Reads the user's text and the text generated so far, and picks adapters.

        Args:
            before: the decision for the sentence before, which inertia holds on to.
        """
        found = self.router.classify(prompt, generated)
        allowed = {n: y for n, y in found.probabilities.items() if n not in self.forbidden}
        total = sum(allowed.values())
        probabilities = {name: y / total for name, y in allowed.items()} if total > 0 else {}
        doubt = found.doubt
        if before is not None and self.inertia:
            old = before.probabilities
            probabilities = {n: self._held(y, old[n]) for n, y in probabilities.items()}
            doubt = self._held(doubt, before.doubt)
        confidence = (1 - doubt) * max(probabilities.values(), default=0.0)
        sure = confidence >= self.rule.min_confidence
        selected = select(probabilities, self.rule) if sure else ()
        decision = RouteDecision(
            probabilities=probabilities,
            selected=selected,
            weights=weigh(probabilities, selected, self.rule.weigh),
            confidence=confidence,
            doubt=doubt,
        )
        adapters = self.overrule(decision, generated) if self.overrule else None
        if adapters is None:
            return decision
        return replace(decision, weights=parse_weights(adapters, self.names))

    def weights_for(self, prompt: str) -> dict[str, float]:
        """The fusion that an answer to the prompt begins with."""
        return self.decide(prompt).weights

    def _held(self, new: float, old: float) -> float:
        return (1 - self.inertia) * new + self.inertia * old


Steering = Pinned | Routed


def load_router(bundle: Bundle) -> Router | None:
    """The bundle's router; None where it has none.

    Raises:
        BundleError: it is damaged, or onnxruntime refuses its graph.
    """
    entry = bundle.manifest.router
    if entry is None:
        return None
    graph, head = bundle.router()
    try:
        return Router(graph, head, bundle.tokenizer(ROUTER_TOKENIZER), entry.settings)
    except RouterError as error:
        raise BundleError(error.cause, error.remedy) from error


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
    every, inertia = course_of(**options)
    return Routed(router, rule, forbidden, options.get("on_route"), known, every, inertia)


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
    course_of(**options)
    return selection_of(default, **options), frozenset(forbidden)
