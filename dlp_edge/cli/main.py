"""`dlp-edge`: parses the command line, runs a verb, turns errors into exit codes."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dlp_edge import __version__
from dlp_edge.cli import output
from dlp_edge.cli.hub import pull, push
from dlp_edge.cli.scale import convert, front
from dlp_edge.cli.verbs import (
    add,
    bench,
    chat,
    completion,
    demo,
    eval,
    export,
    inspect,
    remove,
    route,
    run,
    serve,
    sign,
    train_router,
    train_skill,
    verify,
)
from dlp_edge.errors import DlpEdgeError, ResourceError, UsageError

VERBS = (
    demo,
    train_skill,
    train_router,
    export,
    add,
    remove,
    convert,
    inspect,
    verify,
    sign,
    pull,
    push,
    route,
    run,
    chat,
    serve,
    front,
    bench,
    eval,
    completion,
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are those of the rest: one line, or JSON."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"See {self.prog} --help")


def build_parser() -> Parser:
    parser = Parser(
        prog="dlp-edge",
        description="One local language model with many LoRA skills, fused sentence by sentence.",
        epilog="Exit codes: 0 ok, 1 internal, 2 usage, 3 bad bundle or adapter, 4 resources "
        "(memory, disk, device, port), 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"dlp-edge {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(subparsers)
    parser.set_defaults(parser=parser)  # for `completion`, which lists all of it
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words  # also where the rest cannot be parsed
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A pipe on Windows is cp1252. What is no UTF-8 in the input is refused as a prompt. A
            # terminal knows its encoding, and shows "?" for what that lacks.
            errors = "surrogateescape" if stream is sys.stdin else "replace"
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that clean-up runs
    try:
        parsed = build_parser().parse_args(words)
        if parsed.verbose:
            logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
            logging.getLogger("dlp_edge").setLevel(logging.DEBUG)
        code = int(parsed.run(parsed))
        sys.stdout.flush()  # here, where a full disk is an error like others
        return code
    except DlpEdgeError as error:
        return _report(error, as_json)
    except MemoryError:
        remedy = "Close other programs, or use a smaller backbone or context"
        return _report(ResourceError("memory ran out", remedy), as_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            if error.filename is None:
                return _report_internal(error, as_json)
            cause = f"{error.filename} cannot be used ({error.strerror})"
            return _report(UsageError(cause, "Choose another path"), as_json)
        _discard_output()
        remedy = "Free some space, or write elsewhere"
        return _report(ResourceError(f"cannot write ({error.strerror})", remedy), as_json)
    except Exception as error:  # the last line of defence: no traceback for users
        return _report_internal(error, as_json)


def _discard_output() -> None:
    """Sends what is still buffered for stdout nowhere, so that the exit does not fail on it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_internal(error: Exception, as_json: bool) -> int:
    if os.environ.get("DLP_EDGE_TRACEBACK"):
        traceback.print_exception(error)
    cause = f"internal error: {type(error).__name__}: {error}"
    return _report(DlpEdgeError(cause, "Set DLP_EDGE_TRACEBACK=1 and report it"), as_json)


def _report(error: DlpEdgeError, as_json: bool) -> int:
    if as_json:
        output.print_json(
            {
                "error": {
                    "type": type(error).__name__,
                    "cause": error.cause,
                    "remedy": error.remedy,
                    "exit_code": error.exit_code,
                }
            }
        )
    output.print_error(error)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
