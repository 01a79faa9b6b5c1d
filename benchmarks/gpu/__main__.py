"""Everything a GPU has to show, in one command of less than nine minutes.

    python -m benchmarks.gpu OUT [--bundles FOLDER] [--demo BUNDLE]

Each step runs in a process of its own and leaves OUT/STEP.json; a step whose file is there is not
run again, so that an interrupted run, or one out of time, resumes. At the end OUT/table.md has the
results. Steps: the tests that need a GPU, on the bundles of `tests.gpu.write_bundles`; `dlp-edge
bench` of the demo's bundle; and steps of random-weight backbones of 1.5B and 8B in int4, nf4 and
fp16, with and without captures, with a profile of each.

    --bundles FOLDER    written by `python -m tests.gpu.write_bundles FOLDER` where torch is
    --demo BUNDLE       a bundle of the demo's backbone for CUDA
    --device cpu        tries the command without a GPU; with --sizes tiny, in a minute
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.card import find_card
from dlp_edge.runtime.engine.backbone import NOT_CAPTURED_FORMATS

FORMS = ("int4", "nf4", "fp16")
LONGEST_STEP = 150  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(usage="python -m benchmarks.gpu OUT [options]")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundles", type=Path)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sizes", default="1.5B,8B")
    parser.add_argument("--minutes", type=float, default=8.5)
    arguments = parser.parse_args()
    begun, out = time.monotonic(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    card = find_card() if arguments.device == "cuda" else None
    (out / "card.json").write_text(json.dumps(asdict(card) if card else None))
    left = []
    for name, command in steps(arguments):
        file = out / f"{name}.json"
        if file.exists():
            continue
        seconds = 60 * arguments.minutes - (time.monotonic() - begun)
        if seconds < 10:
            left.append(name)
            continue
        started = time.monotonic()
        result = run(command, arguments, min(seconds, LONGEST_STEP))
        result["seconds"] = time.monotonic() - started
        file.write_text(json.dumps(result, indent=1))
        print(f"{name:24} {result['seconds']:6.1f} s  {result.get('error', '')}", flush=True)
    (out / "table.md").write_text(table(out, arguments.sizes.split(",")))
    if left:
        print(f"out of time, run it again for: {', '.join(left)}")
    return 0


def steps(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """The name and the command of each step, the most valuable first."""
    python, device = [sys.executable, "-m"], ["--device", arguments.device]
    if arguments.bundles and arguments.device == "cuda":
        yield "tests", [*python, "pytest", "-q", "-m", "not slow", "tests/gpu/test_gpu.py"]
    for size in arguments.sizes.split(","):
        for form in FORMS:
            case = [*python, "benchmarks.gpu.case", size, form, *device]
            if form not in NOT_CAPTURED_FORMATS:
                yield f"{size}-{form}-captures", [*case, "--captures"]
            yield f"{size}-{form}-plain", case
    if arguments.demo:
        command = [*python, "dlp_edge.cli.main", "bench", str(arguments.demo), *device]
        yield "demo", [*command, "--rounds", "3", "--json"]
    for size in arguments.sizes.split(","):
        for form in FORMS:
            case = [*python, "benchmarks.gpu.case", size, form, *device]
            yield f"{size}-{form}-profile", [*case, "--profile", "--steps", "16"]


def run(command: list[str], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The JSON that a command prints, or its last lines; what went wrong is `error`."""
    environment = dict(os.environ)
    if arguments.bundles:
        environment["DLP_EDGE_GPU_BUNDLES"] = str(arguments.bundles.resolve())
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {seconds:.0f} s"}
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return {"error": said[-1] if said else "failed", "output": done.stdout[-4000:]}
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"output": done.stdout[-4000:]}
    return found


def table(out: Path, sizes: list[str]) -> str:
    """The results for docs/gpu.md."""
    card = json.loads((out / "card.json").read_text())
    lines = [
        f"{card['name']}, driver {card['driver']}, {card['bandwidth'] / 1e9:.0f} GB/s"
        if card
        else "On the CPU: to try the command, not to be compared with a GPU.",
        "",
        "| backbone | format | captures | case | ms a step | tokens/s | bandwidth | GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        for form in FORMS:
            for kind in ("captures", "plain"):
                lines += rows(out / f"{size}-{form}-{kind}.json")
    for name in ("tests", "demo"):
        if (out / f"{name}.json").exists():
            said = json.loads((out / f"{name}.json").read_text())
            lines += ["", f"{name}: {said.get('error') or said.get('output', 'done')[-200:]}"]
    return "\n".join(lines) + "\n"


def rows(file: Path) -> Iterator[str]:
    if not file.exists():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    if "error" in found:
        yield f"| {file.stem} | | | {found['error'][:80]} | | | | |"
        return
    for case, said in found["cases"].items():
        share = said["share_of_bandwidth"]
        cells = [
            found["size"],
            found["format"],
            "yes" if found["captures"] else "no",
            case,
            f"{said['step_ms']:.2f}",
            f"{said['tokens_per_second']:.1f}",
            "" if share is None else f"{share:.0%}",
            f"{found.get('device_bytes', found['weight_bytes']) / 1e9:.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
