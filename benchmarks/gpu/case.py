"""One case of the GPU benchmark, in a process of its own: `python -m benchmarks.gpu.case ...`.

Prints JSON: a step's time for the base model, two fused adapters of rank 8, and eight sequences
with fusions of their own, with bytes and share of the card's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.gpu.card import Card, find_card
from benchmarks.gpu.random_backbone import RANK, SIZES, RandomBackbone
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.engine.backbone import Backbone, open_backbone
from dlp_edge.runtime.engine.device import Device, choose_device

ROOM, PROMPT = 640, 512
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("form", choices=("int4", "nf4", "fp16"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--captures", action="store_true")
    parser.add_argument("--profile", action="store_true", help="time each kind of node instead")
    parser.add_argument("--steps", type=int, default=64)
    arguments = parser.parse_args()
    begun, card = time.perf_counter(), find_card() if arguments.device == "cuda" else None
    random = RandomBackbone(SIZES[arguments.size], arguments.form)
    device = Device("cuda", 1, cuda_graphs=arguments.captures)
    if arguments.device == "cpu":
        device = choose_device("cpu", "cpu", None).without_operators()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.profile:
            _profile_into(f"{folder}/profile")
        used = card.used() if card else 0
        backbone = open_backbone(Path(), random.entry, device, random.model, random.weights)
        document: dict[str, Any] = {
            "size": arguments.size,
            "format": arguments.form,
            "captures": backbone.cuda_graphs is not None,
            "load_seconds": time.perf_counter() - begun,
            "weight_bytes": sum(weight.nbytes for weight in random.weights.values()),
        }
        if arguments.profile:
            document["nodes"] = _nodes(_measure_profile(backbone, random, arguments.steps))
        else:
            document["cases"] = _cases(backbone, random, arguments.steps, card)
        if card:
            document["device_bytes"] = card.used() - used
    print(json.dumps(document))


def _cases(
    backbone: Backbone, random: RandomBackbone, steps: int, card: Card | None
) -> dict[str, Any]:
    stack = random.adapters(2 * BATCH)
    one = make_engine(backbone, stack, ROOM)
    several = make_engine(backbone, stack, ROOM, BATCH, beside=one)
    pairs = [{str(2 * n): 0.6, str(2 * n + 1): 0.4} for n in range(BATCH)]
    found = {"base": (one, [{}]), "two": (one, pairs[:1]), "eight": (several, pairs)}
    slots = sum(2 * 2 * RANK * (slot.input_size + slot.output_size) for slot in random.entry.slots)
    cases = {}
    for name, (engine, fusions) in found.items():
        prefill = _begin(engine, fusions)
        times = _steps(engine, len(fusions), steps)
        milliseconds = 1e3 * median(times)
        size = random.bytes_per_token + (0 if name == "base" else 2 * slots * len(fusions))
        size += len(fusions) * PROMPT * _cache_bytes(random)
        share = size / (milliseconds / 1e3) / card.bandwidth if card else None
        cases[name] = {
            "step_ms": milliseconds,
            "tokens_per_second": 1e3 * len(fusions) / milliseconds,
            "bytes_per_step": size,
            "share_of_bandwidth": share,
            "prefill_tokens_per_second": PROMPT / prefill,
        }
    return cases


def _begin(engine: Engine, fusions: Sequence[dict[str, float]]) -> float:
    """Prompts under these fusions; returns the seconds of the last one."""
    seconds = 0.0
    for sequence, fusion in enumerate(fusions):
        engine.fuse(fusion, sequence)
        engine.decoder.truncate(0, sequence)
        begun = time.perf_counter()
        engine.decoder.prefill([1 + token % 900 for token in range(PROMPT)], sequence)
        seconds = time.perf_counter() - begun
    return seconds


def _steps(engine: Engine, sequences: int, count: int) -> list[float]:
    times = []
    for step in range(count + 3):  # the first ones are captured
        begun = time.perf_counter()
        logits = engine.decoder.step([1 + step] * sequences)
        times.append(time.perf_counter() - begun)
    if not np.isfinite(logits).all():
        raise SystemExit("the logits are not finite")
    return times[3:]


def _cache_bytes(random: RandomBackbone) -> int:
    entry = random.entry
    return 2 * 2 * entry.num_layers * entry.num_kv_heads * entry.head_size


def _profile_into(prefix: str) -> None:
    """Make every session write onnxruntime's profile."""
    make = ort.SessionOptions

    def options() -> Any:
        made = make()
        made.enable_profiling, made.profile_file_prefix = True, prefix
        return made

    ort.SessionOptions = options


def _measure_profile(backbone: Backbone, random: RandomBackbone, steps: int) -> Path:
    engine = make_engine(backbone, random.adapters(2), ROOM)
    _begin(engine, [{"0": 0.6, "1": 0.4}])
    _steps(engine, 1, steps)
    return Path(backbone.session.end_profiling())


def _nodes(profile: Path) -> dict[str, Any]:
    """Calls and microseconds of each kind of node, over prompt and steps."""
    calls, spent = Counter[str](), Counter[str]()
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind = event["args"]["op_name"]
            calls[kind] += 1
            spent[kind] += event["dur"]
    return {kind: {"calls": calls[kind], "microseconds": spent[kind]} for kind in calls}


if __name__ == "__main__":
    main()
