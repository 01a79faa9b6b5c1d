"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from dlp_edge.errors import UsageError
from dlp_edge.types import KvPolicy, RequestsMode, RouteEvery, SelectRule, WeighRule


def add_output(parser: argparse.ArgumentParser) -> None:
    """What every verb takes."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="no progress and no remarks on stderr"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log to stderr what happens")


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="bundle folder")


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "webgpu"))
    parser.add_argument("--max-context", type=int, default=4096, metavar="TOKENS")
    parser.add_argument("--threads", type=int, help="CPU threads")


def add_routing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("routing (defaults: the bundle's)")
    rules = [rule.replace("_", "-") for rule in get_args(SelectRule)]
    group.add_argument("--select", choices=rules, help="selection rule")
    group.add_argument("--p", type=float, help="p of nucleus and threshold")
    group.add_argument("--k", type=int, help="k of top-k")
    group.add_argument("--weigh", choices=get_args(WeighRule), help="fusion weights")
    group.add_argument("--min-confidence", type=float, help="below this the base model answers")
    group.add_argument("--forbid", help="adapters that must not be picked: a,b")


def add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--adapters", help="pin adapters: a,b=0.3; '' is the base model")
    add_schedule(group)
    group.add_argument(
        "--requests",
        choices=get_args(RequestsMode),
        default="auto",
        help="several requests in one prompt: answer each on its own (auto), or all as one text",
    )
    group.add_argument("--max-new-tokens", type=int)
    group.add_argument("--temperature", type=float, help="0 is greedy (default)")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop string; repeatable")
    group.add_argument(
        "--no-repetition-stop",
        dest="repetition_stop",
        action="store_false",
        default=None,
        help="do not stop an answer that repeats its sentences",
    )
    group.add_argument(
        "--speculate",
        action="store_true",
        default=None,
        help="prompt-lookup decoding: same answer, faster where it copies",
    )
    group.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="constrain the answer to this JSON schema"
    )


def add_schedule(parser: argparse._ActionsContainer) -> None:
    """When to route, and what happens to the KV cache."""
    parser.add_argument(
        "--kv", choices=get_args(KvPolicy), help="KV cache on a change of fusion (keep)"
    )
    parser.add_argument(
        "--route-every", choices=get_args(RouteEvery), help="when to route (sentence)"
    )
    parser.add_argument(
        "--inertia", type=float, help="weight of the previous decision at a sentence start (0)"
    )


def whole_number(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def whole_numbers(text: str) -> tuple[int, ...]:
    """`2,3` as (2, 3).

    Raises:
        UsageError: an item is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of whole numbers", "Write it as 2,3") from error


_PLAIN = (
    "p k weigh min_confidence route_every inertia kv max_new_tokens temperature top_p top_k "
    "min_p repetition_penalty seed stop speculate repetition_stop requests"
).split()


def request_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `Runtime.generate` or `Runtime.route`, without those not given."""
    given = {name: getattr(arguments, name, None) for name in _PLAIN}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.select is not None:
        options["select"] = arguments.select.replace("-", "_")
    if arguments.forbid is not None:
        options["forbid"] = [name.strip() for name in arguments.forbid.split(",")]
    if getattr(arguments, "adapters", None) is not None:
        options["adapters"] = parse_adapters(arguments.adapters)
    if getattr(arguments, "json_schema", None) is not None:
        options["json_schema"] = read_text(arguments.json_schema)
    return options


def read_text(path: Path) -> str:
    """The content of a text file given as an argument.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors write a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read", "Check the path") from error


def parse_adapters(text: str) -> dict[str, float]:
    """`a,b=0.3` as {"a": 1.0, "b": 0.3}; an empty text is the base model."""
    weights: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight) if weight else 1.0
        except ValueError as error:
            raise UsageError(
                f"the weight of {name} is {weight!r}", "Write it as a,b=0.3"
            ) from error
    return weights


def add_server(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds where a server listens, whom it answers and what they may send; returns their group."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    group.add_argument("--port", type=int, default=8080, help="0 picks a free port (8080)")
    group.add_argument("--key", help="API key that clients must send; better set as DLP_EDGE_KEY")
    group.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this server"
    )
    group.add_argument("--max-body", type=whole_number(1), default=1 << 20, metavar="BYTES")
    group.add_argument("--max-messages", type=whole_number(1), default=256, metavar="N")
    return group
