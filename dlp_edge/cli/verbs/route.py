"""`dlp-edge route BUNDLE TEXT`: what the router decides, without the backbone."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.edition import read_current
from dlp_edge.cli import options, output
from dlp_edge.types import RouteDecision


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
    from dlp_edge.runtime.routing.policy import load_router, routed
    from dlp_edge.runtime.text.prompt import check_prompt

    check_prompt(arguments.text)

    def decide(bundle: Bundle) -> RouteDecision:
        manifest = bundle.manifest
        routing = parse_options(options.request_options(arguments), manifest).routing
        router = routed(routing, load_router(bundle), manifest)
        return router.decide(arguments.text, arguments.generated)

    decision = read_current(arguments.bundle, decide)
    if arguments.json:
        output.print_json(asdict(decision))
        return 0
    width = max((len(name) for name in decision.probabilities), default=0)
    for name, probability in sorted(decision.probabilities.items(), key=lambda item: -item[1]):
        weight = decision.weights.get(name)
        chosen = "" if weight is None else f"  weight {weight:.3f}"
        print(f"{name:<{width}}  {probability:.4f}{chosen}")
    if not decision.weights and not arguments.quiet:
        output.note("the router abstains: the base model answers")
    return 0
