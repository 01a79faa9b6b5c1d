"""`dlp-edge bench BUNDLE`: how fast a bundle is on this machine."""

from __future__ import annotations

import argparse
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlp_edge.cli import options, output
from dlp_edge.errors import UsageError

_LIMIT = re.compile(r"\s*([^/<>=]+?)\s*/\s*([^/<>=]+?)\s*(<=|>=)\s*(\d+(?:\.\d+)?)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Limit:
    """What `--assert` demands of the time per token of two cases."""

    case: str
    other: str
    sign: str
    bound: float


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure speed and memory on this machine",
        epilog="Cases: base, one, two and four adapters fused throughout, and dlp: the router "
        "asked and two adapters fused anew at every sentence of 15 tokens.",
    )
    options.add_bundle(parser)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "webgpu"))
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--synthetic",
        type=options.whole_number(2),
        nargs="+",
        default=[],
        metavar="N",
        help="use N random adapters instead of the bundle's: 5 25 50 100",
    )
    parser.add_argument(
        "--router",
        action="append",
        default=[],
        metavar="NAME=BUNDLE",
        help="also measure another bundle's router (the paper's table 4: mini-MLP, ALBERT)",
    )
    parser.add_argument(
        "--assert",
        dest="limits",
        action="append",
        default=[],
        metavar="LIMIT",
        help='exit with 1 if the time per token exceeds it: "dlp/base<=1.10"; repeatable',
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="plot the results (matplotlib)"
    )
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dlp_edge.bench.measure import measure
    from dlp_edge.bench.plot import draw

    limits = [_parse_limit(text) for text in arguments.limits]
    routers = dict(_parse_router(text) for text in arguments.router)
    shown = sys.stderr.isatty() and not arguments.quiet
    document = measure(
        arguments.bundle,
        arguments.device,
        arguments.threads,
        arguments.prompt_tokens,
        arguments.new_tokens,
        arguments.rounds,
        arguments.synthetic,
        routers,
        _tell if shown else None,
    )
    document["limits"] = [_judge(limit, document["cases"]) for limit in limits]
    if arguments.plot is not None:
        draw(document, arguments.plot)
    if arguments.json:
        output.print_json(document)
    else:
        _print(document)
    return 0 if all(limit["kept"] for limit in document["limits"]) else 1


def _tell(fraction: float) -> None:
    output.show_status("" if fraction >= 1 else f"measuring: {fraction:.0%}")


def _parse_limit(text: str) -> Limit:
    found = _LIMIT.fullmatch(text)
    if found is None:
        raise UsageError(f"{text!r} is no limit", 'Write it as "dlp/base<=1.10"')
    return Limit(found[1], found[2], found[3], float(found[4]))


def _parse_router(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise UsageError(f"--router {text!r} is not NAME=BUNDLE", "Write --router albert=folder")
    return name, Path(folder)


def _judge(limit: Limit, cases: dict[str, Any]) -> dict[str, Any]:
    """The limit with the ratio that was measured, and whether it is kept."""
    from dlp_edge.bench.measure import ratio

    for name in (limit.case, limit.other):
        if name not in cases:
            raise UsageError(f"there is no case {name!r}", f"There are: {', '.join(cases)}")
    mine, theirs = (cases[name]["rounds_ms_per_token"] for name in (limit.case, limit.other))
    found = ratio(mine, theirs)["median"]
    return {
        "limit": f"{limit.case}/{limit.other}{limit.sign}{limit.bound:g}",
        "found": found,
        "kept": _COMPARE[limit.sign](found, limit.bound),
    }


def _print(document: dict[str, Any]) -> None:
    print(
        f"{document['backbone']}, {document['quantisation']}, {document['device']}: prompt "
        f"{document['prompt_tokens']} tokens, answer {document['new_tokens']}, "
        f"{document['rounds']} rounds"
    )
    width = max(len(name) for name in document["cases"])
    print(
        f"{'':<{width}}  tokens/s  step p50/p99 ms  prefill/s  first token ms  switch ms  "
        "router ms  over the first  of bandwidth"
    )
    first = next(iter(document["cases"]))
    for name, case in document["cases"].items():
        ratio = document["ratios"].get(f"{name}/{first}", {"median": 1.0})["median"]
        router = "" if case["router_ms"] is None else f"{case['router_ms']['p50']:.2f}"
        step = f"{case['step_ms']['p50']:.2f}/{case['step_ms']['p99']:.2f}"
        print(
            f"{name:<{width}}  {case['decode_tokens_per_second']:>8.1f}  {step:>15}  "
            f"{case['prefill_tokens_per_second']:>9.0f}  {case['first_token_ms']['p50']:>14.0f}  "
            f"{case['switch_ms']['p50']:>9.2f}  {router:>9}  {ratio:>14.3f}  "
            f"{case['share_of_copy_bandwidth']:>12.0%}"
        )
    megabytes, copying = document["peak_bytes"] / 1e6, document["copy_bytes_per_second"] / 1e9
    print(
        f"load {document['load_seconds']:.2f} s, peak memory {megabytes:.0f} MB, "
        f"copying {copying:.1f} GB/s"
    )
    for limit in document["limits"]:
        verdict = (
            output.paint("kept", "green", sys.stdout)
            if limit["kept"]
            else output.paint("missed", "red", sys.stdout)
        )
        print(f"{limit['limit']}: {limit['found']:.3f}, {verdict}")
