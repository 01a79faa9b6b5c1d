"""What decides the fusion of a sentence: the router, or the application that pinned it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from dlp_edge.bundle.files import ROUTER_TOKENIZER
from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.bundle.routed_folder import RoutedFolder, RoutedManifest
from dlp_edge.errors import BundleError, RouterError, UsageError
from dlp_edge.runtime.options import OnRoute, parse_weights
from dlp_edge.runtime.request import Routing, RoutingSchedule
from dlp_edge.runtime.routing.request_splitter import RequestSplitter
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.routing.selection import confidence_of, select, weigh
from dlp_edge.types import RouteDecision


@dataclass(frozen=True)
class SentenceFusion:
    """What writes a sentence.

    Attributes:
        weights: adapter -> weight; none: the base model.
        decision: the router's; None where the weights are pinned.
    """

    weights: dict[str, float]
    decision: RouteDecision | None = None

    @property
    def confidence(self) -> float | None:
        """The decision's; None where the weights are pinned."""
        return None if self.decision is None else self.decision.confidence


class RoutingPolicy(Protocol):
    """Decides who writes each sentence of an answer."""

    def at_prompt(self, prompt: str) -> SentenceFusion:
        """What writes the first sentence."""

    def at_sentence(self, prompt: str, generated: str, before: SentenceFusion) -> SentenceFusion:
        """What writes the next sentence, whose first token ends the generated text; `before`
        itself where nothing is to be decided."""


@dataclass(frozen=True)
class Pinned:
    """Always these weights; nothing is routed."""

    weights: dict[str, float]

    def at_prompt(self, prompt: str) -> SentenceFusion:
        return SentenceFusion(self.weights)

    def at_sentence(self, prompt: str, generated: str, before: SentenceFusion) -> SentenceFusion:
        return before


@dataclass(frozen=True)
class Routed:
    """The router decides at the prompt and at the first token of every sentence.

    Attributes:
        forbidden: labels whose probability is set to zero and shared among the others.
        on_route: the application's say in a decision.
        names: the adapters that `on_route` may name.
    """

    router: Router
    rule: SelectionRule
    forbidden: frozenset[str] = frozenset()
    on_route: OnRoute | None = None
    names: tuple[str, ...] = ()
    schedule: RoutingSchedule = field(default_factory=RoutingSchedule)

    def at_prompt(self, prompt: str) -> SentenceFusion:
        decision = self.decide(prompt)
        return SentenceFusion(decision.weights, decision)

    def at_sentence(self, prompt: str, generated: str, before: SentenceFusion) -> SentenceFusion:
        if self.schedule.every == "prompt":
            return before
        decision = self.decide(prompt, generated, before.decision)
        return SentenceFusion(decision.weights, decision)

    def decide(
        self, prompt: str, generated: str = "", before: RouteDecision | None = None
    ) -> RouteDecision:
        """Reads the user's text and the text generated so far, and picks adapters.

        Args:
            before: the decision for the sentence before, which counts by `inertia`.
        """
        classification = self.router.classify(prompt, generated)
        allowed = {n: y for n, y in classification.probabilities.items() if n not in self.forbidden}
        total = sum(allowed.values())
        probabilities = {name: y / total for name, y in allowed.items()} if total > 0 else {}
        doubt = classification.doubt
        if before is not None and self.schedule.inertia:
            old = before.probabilities
            probabilities = {n: self._mixed(y, old[n]) for n, y in probabilities.items()}
            doubt = self._mixed(doubt, before.doubt)
        selected = select(probabilities, self.rule, doubt)
        decision = RouteDecision(
            probabilities=probabilities,
            selected=selected,
            weights=weigh(probabilities, selected, self.rule.weigh),
            confidence=confidence_of(probabilities, doubt),
            doubt=doubt,
        )
        adapters = self.on_route(decision, generated) if self.on_route else None
        if adapters is None:
            return decision
        return replace(decision, weights=parse_weights(adapters, self.names))

    def _mixed(self, new: float, old: float) -> float:
        inertia = self.schedule.inertia
        return (1 - inertia) * new + inertia * old


def policy_for(routing: Routing, router: Router | None, manifest: RoutedManifest) -> RoutingPolicy:
    """The policy that a request asks for.

    Raises:
        UsageError: it leaves the choice to a router, and the bundle has none.
    """
    if routing.pinned is not None:
        return Pinned(routing.pinned)
    return routed(routing, router, manifest)


def routed(routing: Routing, router: Router | None, manifest: RoutedManifest) -> Routed:
    """Routing under a request's options, whatever it pins.

    Raises:
        UsageError: the bundle has no router.
    """
    names = tuple(entry.name for entry in manifest.adapters)
    if router is None:
        example = f", for example {names[0]!r}" if names else ""
        raise UsageError(
            "the bundle has no router to pick adapters", f"Pin them with adapters=...{example}"
        )
    return Routed(
        router, routing.rule, routing.forbidden, routing.on_route, names, routing.schedule
    )


def load_router(bundle: RoutedFolder) -> Router | None:
    """The bundle's router; None where it has none.

    Raises:
        BundleError: it is damaged, or onnxruntime refuses its graph.
    """
    entry = bundle.manifest.router
    if entry is None:
        return None
    graph, head, check_length = bundle.router()
    tokenizer = bundle.tokenizer(ROUTER_TOKENIZER)
    try:
        return Router(graph, head, tokenizer, entry.settings, check_length)
    except RouterError as error:
        raise BundleError(error.cause, error.remedy) from error


def load_splitter(bundle: RoutedFolder, router: Router | None) -> RequestSplitter | None:
    """The bundle's request splitter, which shares the router's tokenizer; None where it has none.

    Raises:
        BundleError: it is damaged, or onnxruntime refuses its graph.
    """
    entry = bundle.manifest.router
    if entry is None or router is None or not entry.splitter:
        return None
    try:
        return RequestSplitter(bundle.splitter(), router.tokenizer)
    except RouterError as error:
        raise BundleError(error.cause, error.remedy) from error
