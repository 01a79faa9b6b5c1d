"""What an export measured: sizes, parity with transformers + PEFT, loss by quantisation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dlp_edge.bundle.adapter_stack import AdapterStack
from dlp_edge.bundle.files import BACKBONE, BACKBONE_DATA
from dlp_edge.bundle.graph_allowlist import BACKBONE_OPERATORS
from dlp_edge.bundle.manifest import BackboneEntry
from dlp_edge.bundle.peft_reader import PeftAdapter
from dlp_edge.bundle.weight_file import read_weights
from dlp_edge.errors import AdapterError, BackboneError
from dlp_edge.export.reference import Logits, Reference
from dlp_edge.export.source import Source
from dlp_edge.onnx_bytes.reader import read_graph
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.decoder import Decoder
from dlp_edge.runtime.engine.device import choose_device
from dlp_edge.runtime.engine.graphs.half_graph import half_graph, half_weights

HELDOUT = Path(__file__).with_name("heldout.txt")
PARITY_TOKENS = 200
PERPLEXITY_TOKENS = 1024
FAST_TOKENS = 256  # instead of PERPLEXITY_TOKENS
TIMED_AFTER = 256
TIMED_STEPS = 64
CHECK_TOKENS = 32  # when each adapter is compared alone
# Tolerance for the mean |difference| of an adapter's logits: EXACT for rounding, or SLACK times the
# base model's difference by quantisation.
EXACT = 1e-2
SLACK = 5.0
# Tolerance for the RMS difference of the base model's logits, in standard deviations of the
# source's logits: int4 on random weights reaches 0.3, a different model 1.4.
ANOTHER_MODEL = 0.7
# Perplexity ratios up to which a bundle is called good or usable.
GOOD = 1.02
USABLE = 1.1
APART = "Export for CUDA apart: --target cuda"  # where half precision is too little


@dataclass(frozen=True)
class Outputs:
    """What a bundle computes, to be compared once its graph is out of memory.

    Attributes:
        ids: the held-out text.
        base: logits [S, V] of the base model at each of the ids.
        alone: for each adapter, its logits at the first CHECK_TOKENS ids.
        fusion: the weights of the compared fusion, and `fused` its logits at the first
            PARITY_TOKENS ids; empty and None if there are no adapters.
        answers: prompts and greedy answers to them (ids); empty in a fast export.
        milliseconds: the median time of a single step; None in a fast export.
    """

    ids: list[int]
    base: Logits
    alone: dict[str, Logits]
    fusion: dict[str, float]
    fused: Logits | None
    answers: Sequence[tuple[Sequence[int], Sequence[int]]]
    milliseconds: float | None


def run_bundle(
    engine: Engine,
    adapters: Sequence[PeftAdapter],
    ids: Sequence[int],
    answers: Sequence[tuple[Sequence[int], Sequence[int]]],
    fast: bool,
) -> Outputs:
    """Run the bundle's base model, each adapter alone, and a fusion: the first two adapters at 0.6
    and 0.4, or a single one at 1.0.

    Raises:
        BackboneError: the graph's logits are not finite.
    """
    ids = list(ids[: min(FAST_TOKENS if fast else PERPLEXITY_TOKENS, engine.decoder.max_context)])
    fusion = dict(zip([adapter.name for adapter in adapters[:2]], (0.6, 0.4), strict=False))
    if len(fusion) == 1:
        fusion = dict.fromkeys(fusion, 1.0)
    base = _bundle_logits(engine, {}, ids)
    if not all(np.isfinite(row).all() for row in base):
        raise BackboneError("the exported backbone's logits are not finite", "Check its weights")
    alone = {a.name: _bundle_logits(engine, {a.name: 1.0}, ids[:CHECK_TOKENS]) for a in adapters}
    fused = _bundle_logits(engine, fusion, ids[:PARITY_TOKENS]) if fusion else None
    milliseconds = None if fast else step_time(engine.decoder, ids)
    return Outputs(ids, base, alone, fusion, fused, answers, milliseconds)


def compare(
    source: Source,
    adapters: Sequence[PeftAdapter],
    found: Outputs,
    on_progress: Callable[[float], None],
) -> dict[str, Any]:
    """Compare a bundle with the source under transformers and PEFT, in fp32.

    Returns:
        `perplexity` (source, bundle, ratio, tokens) of the base model on the held-out text;
        `parity`: for base and fusion, the largest and mean |difference| of the logits and the
        share of positions with the same most probable token;
        `greedy`: see `_agreement`; `milliseconds_per_token`: the median of single steps;
        `verdict`: one line.

    Raises:
        AdapterError: an adapter's logits differ from PEFT's.
        BackboneError: the graph's logits differ from the source's.
    """
    ids = found.ids
    reference = Reference(source.folder)
    expected = reference.logits(ids)
    on_progress(0.3)
    before, after = perplexity(expected, ids), perplexity(found.base, ids)
    _check_backbone(found.base, expected)
    parity = {"base": _differences(found.base[:PARITY_TOKENS], expected[:PARITY_TOKENS])}
    del expected
    measured: dict[str, Any] = {
        "perplexity": {
            "tokens": len(ids) - 1,
            "source": before,
            "bundle": after,
            "ratio": after / before,
        },
        "parity": {"tokens": len(ids[:PARITY_TOKENS]), **parity},
    }
    if found.answers:
        measured["greedy"] = _agreement(reference, found.answers)
    on_progress(0.8)
    limit = max(EXACT, SLACK * parity["base"]["mean_abs_difference"])
    reference.load(adapters)
    for adapter in adapters:
        alone = {adapter.name: 1.0}
        difference = _differences(
            found.alone[adapter.name], reference.logits(ids[:CHECK_TOKENS], alone)
        )
        _check_parity(adapter, difference["mean_abs_difference"], limit)
    if found.fused is not None:
        fused = _differences(found.fused, reference.logits(ids[:PARITY_TOKENS], found.fusion))
        measured["parity"]["fusion"] = {"weights": found.fusion, **fused}
    if found.milliseconds is not None:
        measured["milliseconds_per_token"] = found.milliseconds
    measured["verdict"] = verdict(after / before, measured["parity"]["base"]["greedy_agreement"])
    return measured


def verdict(ratio: float, agreement: float) -> str:
    """Whether the bundle is as good as its source, in one line."""
    word = "good" if ratio <= GOOD else "usable" if ratio <= USABLE else "poor"
    return (
        f"{word}: {ratio:.3f} times the source's perplexity, and {agreement:.1%} of its most "
        "probable tokens"
    )


def _agreement(
    reference: Reference, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, Any]:
    """Agreement of the bundle's greedy answers with the source.

    Returns:
        `agreement`: the share of tokens that the source would choose too, given the same prefix;
        `same_start`: the mean number of tokens before the first disagreement.
    """
    chosen = reference.most_probable([[*prompt, *answer[:-1]] for prompt, answer in answers])
    equal = [
        tokens[len(prompt) - 1 :] == np.asarray(answer)
        for (prompt, answer), tokens in zip(answers, chosen, strict=True)
    ]
    return {
        "prompts": len(answers),
        "tokens": len(answers[0][1]),
        "agreement": float(np.mean(equal)),
        "same_start": float(np.mean([np.append(row, False).argmin() for row in equal])),
    }


def step_time(decoder: Decoder, ids: Sequence[int]) -> float:
    """Median time per token in ms, after TIMED_AFTER tokens of context."""
    steps = min(TIMED_STEPS, decoder.max_context // 2)
    start = min(TIMED_AFTER, decoder.max_context - steps)
    decoder.truncate(0)
    decoder.prefill(ids[:start])
    times = []
    for token in ids[:steps]:
        start_time = time.perf_counter()
        decoder.step([token])
        times.append(time.perf_counter() - start_time)
    return 1e3 * statistics.median(times)


def _check_backbone(actual: Logits, expected: Logits) -> None:
    """Raise BackboneError if the difference is larger than quantisation explains."""
    error = np.mean(
        [((one - other) ** 2).mean() for one, other in zip(actual, expected, strict=True)]
    )
    apart = np.sqrt(error / np.mean([row.var() for row in expected]))
    if not apart <= ANOTHER_MODEL:
        raise BackboneError(
            f"the exported graph is not the backbone: its logits are {apart:.2g} standard "
            f"deviations from the source's, {ANOTHER_MODEL} is allowed",
            "Its configuration has something that the builder leaves out: report it",
        )


def _check_parity(adapter: PeftAdapter, difference: float, limit: float) -> None:
    """Raise AdapterError if the difference is larger than rounding and quantisation explain."""
    if not difference <= limit:
        raise AdapterError(
            f"adapter {adapter.name} does not do in the bundle what it does under PEFT (logits "
            f"differ by {difference:.2g} on average, {limit:.2g} is allowed)",
            "Check that its configuration belongs to its weights, and report it if it does",
        )


def perplexity(logits: Logits, ids: Sequence[int]) -> float:
    """exp of the mean negative log likelihood of ids[1:] under logits[:-1] [S, V]."""
    losses = []
    for row, chosen in zip(logits[:-1], ids[1:], strict=True):
        scores = row.astype(np.float64)  # a row at a time: a vocabulary may have 256,000 tokens
        top = scores.max()
        losses.append(top + np.log(np.exp(scores - top).sum()) - scores[chosen])
    return float(np.exp(np.mean(losses)))


def measure_half(
    entry: BackboneEntry, stack: AdapterStack, folder: Path, ids: Sequence[int]
) -> dict[str, Any]:
    """Perplexity of the base model on a text, in single precision and as CUDA converts a bundle for
    several targets (`runtime/engine/graphs/half_graph.py`), both on the CPU.

    Raises:
        BackboneError: the conversion loses too much.
    """
    ids = list(ids[: min(FAST_TOKENS, entry.context_length)])
    data, path = (folder / BACKBONE).read_bytes(), folder / BACKBONE_DATA
    size = path.stat().st_size
    tensors = read_graph(data, BACKBONE_OPERATORS, BACKBONE_DATA, size).tensors.values()
    with path.open("rb") as file:
        weights, _, _ = read_weights(file, size, tensors, lambda fraction: None)
    device = choose_device("cpu", "cpu", None).without_operators()
    found = []
    for kind in ("float32", "float16"):
        graph = data
        if kind == "float16":
            graph, weights = half_graph(data), half_weights(weights)
        backbone = open_backbone(
            folder / BACKBONE, replace(entry, dtype=kind), device, graph, weights
        )
        engine = make_engine(backbone, stack, len(ids))
        found.append(perplexity(engine.decoder.all_logits(ids).astype(np.float32), ids))
    single, half = found
    if not half <= GOOD * single:  # False for NaN
        raise BackboneError(
            f"half precision makes the perplexity {half / single:.3g} times as large", APART
        )
    return {"tokens": len(ids) - 1, "single": single, "half": half, "ratio": half / single}


def _differences(actual: Logits, expected: Logits) -> dict[str, Any]:
    difference = np.abs(actual - expected)
    return {
        "max_abs_difference": float(difference.max()),
        "mean_abs_difference": float(difference.mean()),
        "greedy_agreement": float((actual.argmax(1) == expected.argmax(1)).mean()),
    }


def _bundle_logits(engine: Engine, fusion: Mapping[str, float], ids: Sequence[int]) -> Logits:
    engine.decoder.set_fusion(engine.fuser.fuse(fusion))
    engine.decoder.truncate(0)
    return engine.decoder.all_logits(ids)
