"""What an export measured: sizes, parity with transformers + PEFT, loss by quantisation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from dlp_edge.bundle.peft_reader import PeftAdapter
from dlp_edge.errors import AdapterError, BackboneError
from dlp_edge.export.source import Source
from dlp_edge.export.suppress_output import suppress_output
from dlp_edge.runtime.decoding.engine import Engine
from dlp_edge.runtime.engine.decoder import Decoder

HELDOUT = Path(__file__).with_name("heldout.txt")
PARITY_TOKENS = 200
PERPLEXITY_TOKENS = 1024
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
Logits = npt.NDArray[np.float32]


def measure(
    source: Source,
    adapters: Sequence[PeftAdapter],
    tokenizer: Tokenizer,
    engine: Engine,
    answers: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> dict[str, Any]:
    """Compare the exported graph with the source under transformers and PEFT, in fp32.

    Compares the base model, each adapter alone, and a fusion: the first two adapters at 0.6 and
    0.4, or a single one at 1.0.

    Args:
        answers: prompts and the bundle's own greedy answers to them (ids).

    Returns:
        `perplexity` (source, bundle, ratio, tokens) of the base model on the held-out text;
        `parity`: for base and fusion, the largest and mean |difference| of the logits and the
        share of positions with the same most probable token;
        `greedy`: see `_agreement`; `milliseconds_per_token`: the median of single steps.

    Raises:
        AdapterError: an adapter's logits differ from PEFT's.
        BackboneError: the graph's logits are not finite, or differ from the source's.
    """
    text = HELDOUT.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    ids = ids[: min(PERPLEXITY_TOKENS, engine.decoder.max_context)]
    fusion = dict(zip([adapter.name for adapter in adapters[:2]], (0.6, 0.4), strict=False))
    if len(fusion) == 1:
        fusion = dict.fromkeys(fusion, 1.0)

    reference = _Reference(source.folder)
    expected = reference.logits(ids)
    actual = _bundle_logits(engine, {}, ids)
    before, after = perplexity(expected, ids), perplexity(actual, ids)
    if not np.isfinite(after):
        raise BackboneError("the exported backbone's logits are not finite", "Check its weights")
    _check_backbone(actual, expected)
    greedy = _agreement(reference, answers)
    parity = {"base": _differences(actual[:PARITY_TOKENS], expected[:PARITY_TOKENS])}
    limit = max(EXACT, SLACK * parity["base"]["mean_abs_difference"])
    reference.load(adapters)
    for adapter in adapters:
        alone = {adapter.name: 1.0}
        short = ids[:CHECK_TOKENS]
        difference = _differences(
            _bundle_logits(engine, alone, short), reference.logits(short, alone)
        )
        _check_parity(adapter, difference["mean_abs_difference"], limit)
    if fusion:
        short = ids[:PARITY_TOKENS]
        fused = _differences(_bundle_logits(engine, fusion, short), reference.logits(short, fusion))
        parity["fusion"] = {"weights": fusion, **fused}
    return {
        "perplexity": {
            "tokens": len(ids) - 1,
            "source": before,
            "bundle": after,
            "ratio": after / before,
        },
        "parity": {"tokens": len(ids[:PARITY_TOKENS]), **parity},
        "greedy": greedy,
        "milliseconds_per_token": step_time(engine.decoder, ids),
    }


def _agreement(
    reference: _Reference, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, Any]:
    """Agreement of the bundle's greedy answers with the source.

    Returns:
        `agreement`: the share of tokens that the source would choose too, given the same prefix;
        `same_start`: the mean number of tokens before the first disagreement.
    """
    equal = []
    for prompt, answer in answers:
        logits = reference.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
        equal.append(logits.argmax(1) == np.asarray(answer))
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
    apart = np.sqrt(((actual - expected) ** 2).mean() / expected.var(axis=1).mean())
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
    scores = logits[:-1].astype(np.float64)
    top = scores.max(axis=1)
    log_sum = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
    chosen = scores[np.arange(len(scores)), np.asarray(ids[1:])]
    return float(np.exp((log_sum - chosen).mean()))


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


class _Reference:
    """The source under transformers, with its adapters under PEFT."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        with suppress_output():
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()

    def load(self, adapters: Sequence[PeftAdapter]) -> None:
        """Load the adapters, renamed so that PEFT accepts the names as module attributes."""
        with suppress_output():
            from peft import PeftModel

        self._names = {adapter.name: f"adapter_{i}" for i, adapter in enumerate(adapters)}
        for adapter in adapters:
            place = {"adapter_name": self._names[adapter.name]}
            with suppress_output():
                if isinstance(self._model, PeftModel):
                    self._model.load_adapter(adapter.folder, **place)
                else:
                    self._model = PeftModel.from_pretrained(self._model, adapter.folder, **place)
        self._model.eval()
        self._scalings = [
            (layer.scaling, dict(layer.scaling))
            for layer in self._model.modules()
            if isinstance(getattr(layer, "scaling", None), dict)
        ]

    @torch.no_grad()
    def logits(self, ids: Sequence[int], fusion: Mapping[str, float] | None = None) -> Logits:
        """Logits [S, V] at each of the ids [S], with the adapters of the fusion scaled by their
        weights."""
        if fusion:
            self._model.base_model.set_adapter([self._names[name] for name in fusion])
            weights = {self._names[name]: weight for name, weight in fusion.items()}
            for scaling, own in self._scalings:
                scaling.update({name: own[name] * weights.get(name, 0.0) for name in own})
        output: Logits = self._model(torch.tensor([list(ids)])).logits[0].float().numpy()
        return output
