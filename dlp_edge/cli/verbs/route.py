"""`dlp-edge route BUNDLE TEXT`: what the router decides, without the backbone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.edition import read_current
from dlp_edge.cli import options, output
from dlp_edge.types import Request, RouteDecision


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("route", help="show the router's decision for a text")
    options.add_bundle(parser)
    parser.add_argument("text", help="the user's text")
    parser.add_argument("--generated", default="", help="the answer so far, at a sentence start")
    options.add_routing(parser)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dlp_edge.runtime.request import parse_options
    from dlp_edge.runtime.request_plan import route_requests
    from dlp_edge.runtime.routing.policy import load_router, load_splitter, routed
    from dlp_edge.runtime.text.prompt import check_prompt

    check_prompt(arguments.text)

    def decide(bundle: Bundle) -> tuple[RouteDecision, tuple[Request, ...]]:
        manifest = bundle.manifest
        routing = parse_options(options.request_options(arguments), manifest).routing
        router = load_router(bundle)
        policy = routed(routing, router, manifest)
        splitter = load_splitter(bundle, router)
        requests = route_requests(splitter, arguments.text, policy.decide)
        return policy.decide(arguments.text, arguments.generated), requests

    decision, requests = read_current(arguments.bundle, decide)
    if arguments.json:
        own = {"requests": [asdict(request) for request in requests]} if len(requests) > 1 else {}
        output.print_json({**asdict(decision), **own})
        return 0
    if len(requests) > 1 and not arguments.generated:
        print_requests(requests)
        return 0
    width = max((len(name) for name in decision.probabilities), default=0)
    for name, probability in sorted(decision.probabilities.items(), key=lambda item: -item[1]):
        weight = decision.weights.get(name)
        chosen = "" if weight is None else f"  weight {weight:.3f}"
        print(f"{name:<{width}}  {probability:.4f}{chosen}")
    if not decision.weights and not arguments.quiet:
        output.note("the router abstains: the base model answers")
    return 0


def print_requests(requests: Sequence[Request]) -> None:
    """A line for each: its adapters, what it leans on, and its text."""
    for number, request in enumerate(requests, 1):
        weights = request.decision.weights if request.decision else {}
        adapters = " + ".join(f"{name} {weight:.2f}" for name, weight in weights.items()) or "base"
        leans = "" if request.leans_on is None else f" (after {request.leans_on + 1})"
        print(f"{number}  {adapters}{leans}  {' '.join(request.text.split())}")
