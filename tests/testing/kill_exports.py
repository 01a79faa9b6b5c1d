"""Exports to one folder, each killed at another point: a process of its own, because one that has
computed with torch cannot fork. Reads its arguments as JSON from stdin, tells what was found on
stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime_genai.models.builder  # noqa: F401  (what an export imports, once for all)

import dlp_edge.export.pipeline as pipeline
import dlp_edge.models.networks.router_mlp  # noqa: F401
import dlp_edge.runtime.routing.router  # noqa: F401
from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.errors import DlpEdgeError
from tests.testing.faults import killed


def main() -> None:
    arguments = json.load(sys.stdin)
    out = Path(arguments["out"])
    adapters = {name: Path(folder) for name, folder in arguments["adapters"].items()}
    router = Path(arguments["router"])

    def export() -> None:
        pipeline.export_bundle(arguments["backbone"], adapters, router, out, "fp32")

    broken: list[str] = []
    at = kills = 0
    while killed(out.parent, at, export):
        kills += 1
        try:
            verify_bundle(out)
        except DlpEdgeError as error:
            broken.append(f"{at}: {error}")
        visible = [path.name for path in out.parent.iterdir() if not path.name.startswith(".")]
        hidden = {path.name for path in out.parent.iterdir()} - {*visible}
        if visible != [out.name] or not hidden <= {f".{out.name}.staging", f".{out.name}.work"}:
            broken.append(f"{at}: {visible} {hidden}")
        at += arguments["every"]
    json.dump({"kills": kills, "broken": broken}, sys.stdout)


if __name__ == "__main__":
    main()
