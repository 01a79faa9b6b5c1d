"""Loading a bundle for a verb, with its progress on the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dlp_edge.cli import output
from dlp_edge.runtime.runtime import Runtime


def open_runtime(arguments: argparse.Namespace, **more: Any) -> Runtime:
    """The Runtime that `options.add_bundle` and `options.add_engine` describe, and more options."""
    shown = sys.stderr.isatty() and not arguments.quiet

    def tell(stage: str, fraction: float) -> None:
        output.show_status("" if fraction >= 1 else f"loading: {stage} {fraction:.0%}")

    return Runtime(
        arguments.bundle,
        device=arguments.device,
        max_context=arguments.max_context,
        threads=arguments.threads,
        on_progress=tell if shown else None,
        **more,
    )
