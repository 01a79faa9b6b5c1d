"""`dlp-edge`: parses the command line, runs a verb, turns errors into exit codes."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from dlp_edge import __version__
from dlp_edge.cli import add, demo, export, inspect, output, remove, route, run, train_router
from dlp_edge.errors import DlpEdgeError, ResourceError

VERBS = (demo, train_router, export, add, remove, inspect, route, run)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dlp-edge",
        description="One local language model with many LoRA skills, fused sentence by sentence.",
        epilog="Exit codes: 0 ok, 1 internal, 2 usage, 3 bad bundle or adapter, 4 resources "
        "(memory, disk, device), 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"dlp-edge {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    parsed = build_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="replace")  # a pipe on Windows is cp1252
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that clean-up runs
    try:
        return int(parsed.run(parsed))
    except DlpEdgeError as error:
        return _report(error, parsed)
    except MemoryError:
        remedy = "Close other programs, or use a smaller backbone or context"
        return _report(ResourceError("memory ran out", remedy), parsed)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the last line of defence: no traceback for users
        if os.environ.get("DLP_EDGE_TRACEBACK"):
            traceback.print_exc()
        cause = f"internal error: {type(error).__name__}: {error}"
        return _report(DlpEdgeError(cause, "Set DLP_EDGE_TRACEBACK=1 and report it"), parsed)


def _report(error: DlpEdgeError, parsed: argparse.Namespace) -> int:
    if parsed.json:
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
    print(f"{output.paint('error:', 'red', sys.stderr)} {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
