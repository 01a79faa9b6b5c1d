"""Measuring a bundle: cases take turns, so that what else the machine does hits all of them.

Rates drift on a busy machine; what can be relied on is a ratio. It is taken within each round, and
the median over the rounds is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dlp_edge.bench.cases import Case, Fusion, own_cases, synthetic_cases
from dlp_edge.bench.machine import copy_bandwidth, peak_memory
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.files import BACKBONE_DATA
from dlp_edge.errors import UsageError
from dlp_edge.runtime.engine.device import choose_device
from dlp_edge.runtime.loaded_bundle import LoadedBundle, load
from dlp_edge.runtime.memory import CacheBudgets
from dlp_edge.runtime.routing.policy import load_router

SENTENCE = 15  # tokens between two routings
TEXT = (
    "The keeper of the lighthouse wrote down every ship that passed, its name and the hour, and "
    "when the fog came in he lit the lamp and sounded the horn until the morning. "
)
Tell = Callable[[float], None]


@dataclass
class Samples:
    """Seconds: of each round, or of each event."""

    first_token: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)  # of a round's answer, all included
    step: list[float] = field(default_factory=list)
    router: list[float] = field(default_factory=list)
    switch: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What every case does in a round: `texts[i]` is the answer before its token i."""

    prompt: Sequence[int]
    answer: Sequence[int]
    texts: Sequence[str]


def measure(
    path: str | Path,
    device: str = "auto",
    threads: int | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 60,
    rounds: int = 9,
    synthetic: Sequence[int] = (),
    other_routers: Mapping[str, Path] | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Measures a bundle, with its own adapters (`own_cases`) or with random ones.

    Args:
        prompt_tokens, new_tokens: length of the prompt and of the answer.
        rounds: how often each case does its work, after one round to warm up.
        synthetic: numbers of random adapters to compare instead of the bundle's own.
        other_routers: name -> a bundle whose router is measured beside this bundle's.
        tell: called with the fraction that is done.

    Returns:
        `cases`: of each, milliseconds (median, 99th percentile) and rates; `ratios`: time per
        token over that of the first case; `load_seconds`, `peak_bytes` and what was measured.

    Raises:
        UsageError: there is too little room for prompt and answer, or nothing to compare.
        BundleError, DeviceError, ResourceError: see `Runtime`.
    """
    if min(prompt_tokens, new_tokens, rounds) < 1 or any(count < 2 for count in synthetic):
        raise UsageError("there is nothing to measure", "Ask for 1 token, round and 2 adapters")
    begun = time.perf_counter()
    bundle = open_bundle(path)
    manifest = bundle.manifest
    room = prompt_tokens + new_tokens
    if room > manifest.backbone.context_length:
        raise UsageError(
            f"the context holds {manifest.backbone.context_length} tokens, {room} are asked for",
            "Ask for fewer",
        )
    if synthetic and not manifest.backbone.slots:
        raise UsageError(
            "the bundle has no slots for adapters", "Measure one exported with adapters"
        )
    chosen = choose_device(device, manifest.target, threads)
    loaded = load(bundle, chosen, room, CacheBudgets(), lambda stage, fraction: None)
    load_seconds = time.perf_counter() - begun
    routers = {
        name: router
        for name, folder in (other_routers or {}).items()
        if (router := load_router(open_bundle(folder))) is not None
    }
    cases = synthetic_cases(loaded, synthetic) if synthetic else own_cases(loaded, routers)
    samples = _rounds(cases, _work(loaded, prompt_tokens, room), rounds, tell)
    copying = copy_bandwidth(chosen.threads)
    weights = manifest.files[BACKBONE_DATA].size
    base = next(iter(samples))
    return {
        "bundle": str(path),
        "backbone": manifest.backbone.name,
        "quantisation": manifest.backbone.quantisation,
        "device": str(loaded.backbone.device),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "load_seconds": load_seconds,
        "peak_bytes": peak_memory(),
        "copy_bytes_per_second": copying,
        "cases": {
            name: _summary(found, prompt_tokens)
            | {"share_of_copy_bandwidth": weights / median(found.per_token) / copying}
            for name, found in samples.items()
        },
        "ratios": {
            f"{name}/{base}": ratio(found.per_token, samples[base].per_token)
            for name, found in samples.items()
            if name != base
        },
    }


def ratio(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Median, least and most of the ratios within each round."""
    ratios = [mine / theirs for mine, theirs in zip(times, others, strict=True)]
    return {"median": median(ratios), "least": min(ratios), "most": max(ratios)}


def _work(loaded: LoadedBundle, prompt_tokens: int, room: int) -> Work:
    tokenizer = loaded.vocabulary.tokenizer
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    ids = list(islice(cycle(ids), room))
    answer = ids[prompt_tokens:]
    return Work(
        ids[:prompt_tokens], answer, [tokenizer.decode(answer[:at]) for at in range(len(answer))]
    )


def _rounds(
    cases: Mapping[str, Case], work: Work, rounds: int, tell: Tell | None
) -> dict[str, Samples]:
    samples = {name: Samples() for name in cases}
    for case in cases.values():
        _run(case, work, Samples())  # the first pass of a process is slower than all others
    for turn in range(rounds):
        for name, case in cases.items():
            _run(case, work, samples[name])
        if tell is not None:
            tell((turn + 1) / rounds)
    return samples


def _run(case: Case, work: Work, samples: Samples) -> None:
    """One round of a case: the prompt, then the answer, which is given."""
    decoder = case.engine.decoder
    fusions = cycle(case.fusions)
    begun = time.perf_counter()
    _begin_sentence(case, "", next(fusions), samples)
    decoder.truncate(0)
    prefilling = time.perf_counter()
    decoder.prefill(work.prompt).argmax()
    decoding = time.perf_counter()
    samples.prefill.append(decoding - prefilling)
    samples.first_token.append(decoding - begun)
    for index, token in enumerate(work.answer):
        if index % SENTENCE == SENTENCE - 1 and len(case.fusions) > 1:
            _begin_sentence(case, work.texts[index], next(fusions), samples)
        stepping = time.perf_counter()
        decoder.step([token])[0].argmax()
        samples.step.append(time.perf_counter() - stepping)
    samples.per_token.append((time.perf_counter() - decoding) / len(work.answer))


def _begin_sentence(case: Case, generated: str, fusion: Fusion, samples: Samples) -> None:
    begun = time.perf_counter()
    if case.router is not None:
        case.router.classify(TEXT, generated)
        samples.router.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    case.engine.decoder.set_fusion(case.engine.fuser.fuse(fusion))
    samples.switch.append(time.perf_counter() - begun)


def _summary(samples: Samples, prompt_tokens: int) -> dict[str, Any]:
    return {
        "prefill_tokens_per_second": prompt_tokens / median(samples.prefill),
        "decode_tokens_per_second": 1 / median(samples.per_token),
        "first_token_ms": _percentiles(samples.first_token),
        "prefill_ms": _percentiles(samples.prefill),
        "step_ms": _percentiles(samples.step),
        "switch_ms": _percentiles(samples.switch),
        "router_ms": _percentiles(samples.router) if samples.router else None,
        "rounds_ms_per_token": [1e3 * seconds for seconds in samples.per_token],
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50": 1e3 * float(p50), "p99": 1e3 * float(p99)}
