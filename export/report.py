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
from dlp_edge.runtime.decoding.loop import Engine
from dlp_edge.runtime.engine.decoder import Decoder

HELDOUT = Path(__file__).with_name("heldout.txt")
PARITY_TOKENS = 200
PERPLEXITY_TOKENS = 1024
TIMED_AFTER = 256
TIMED_STEPS = 64
CHECK_TOKENS = 32  # for each adapter alone
# The mean |difference| of logits that an adapter alone may show: rounding, or so many times what
# quantisation costs the base model.
EXACT = 1e-2
SLACK = 5.0
# The most that the base model's logits may differ, in standard deviations of the source's logits
# at a position (root mean square over the text): int4 on random weights reaches 0.3, a graph that
# is another model 1.4.
ANOTHER_MODEL = 0.7
Logits = npt.NDArray[np.float32]


def measure(
    source: Source,
    adapters: Sequence[PeftAdapter],
    tokenizer: Tokenizer,
    engine: Engine,
    answers: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> dict[str, Any]:
    """Compares the exported graph with the source under transformers and PEFT, in fp32.

    The fusion compared is the first two adapters at 0.6 and 0.4 (the only one at 1.0).

    Every adapter is also compared alone, and refused if it does something else than under PEFT.

    Args:
        answers: prompts and the bundle's own greedy answers to them (ids).

    Returns:
        `perplexity` (source, bundle, ratio, tokens) of the base model on the held-out text;
        `parity`: for base and fusion, the largest and mean |difference| of the logits and the
        share of positions with the same most probable token;
        `greedy`: see `_agreement`; `milliseconds_per_token`: the median of single steps.

    Raises:
        AdapterError: an adapter's arithmetic is not PEFT's.
        BackboneError: the exported graph gives numbers that are not finite.
    """
    text = HELDOUT.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    ids = ids[: min(PERPLEXITY_TOKENS, engine.decoder.max_context)]
    fusion = dict(zip([adapter.name for adapter in adapters[:2]], (0.6, 0.4), strict=False))
    if len(fusion) == 1:
        fusion = dict.fromkeys(fusion, 1.0)

    reference = _Reference(source.folder)
    expected = reference.logits(ids)
    found = _bundle_logits(engine, {}, ids)
    before, after = perplexity(expected, ids), perplexity(found, ids)
    if not np.isfinite(after):
        raise BackboneError("the exported backbone's logits are not finite", "Check its weights")
    _check_backbone(found, expected)
    greedy = _agreement(reference, answers)
    parity = {"base": _differences(found[:PARITY_TOKENS], expected[:PARITY_TOKENS])}
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
    """How far the bundle's greedy answers are the source's.

    Returns:
        `agreement`: the share of tokens that the source, given the same text so far, would have
        chosen too; `same_start`: the tokens before the first that it would not (their mean), so
        far the two answers are the same when each runs for itself.
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
    """The median time of a token in ms, after TIMED_AFTER tokens of context."""
    steps = min(TIMED_STEPS, decoder.max_context // 2)
    start = min(TIMED_AFTER, decoder.max_context - steps)
    decoder.truncate(0)
    decoder.prefill(ids[:start])
    times = []
    for token in ids[:steps]:
        begun = time.perf_counter()
        decoder.step([token])
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def _check_backbone(found: Logits, expected: Logits) -> None:
    """A graph may lose by quantisation, but must be the source's."""
    apart = np.sqrt(((found - expected) ** 2).mean() / expected.var(axis=1).mean())
    if not apart <= ANOTHER_MODEL:
        raise BackboneError(
            f"the exported graph is not the backbone: its logits are {apart:.2g} standard "
            f"deviations from the source's, {ANOTHER_MODEL} is allowed",
            "Its configuration has something that the builder leaves out: report it",
        )


def _check_parity(adapter: PeftAdapter, difference: float, limit: float) -> None:
    """An adapter may differ from PEFT by rounding and quantisation, not by its arithmetic."""
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


def _differences(found: Logits, expected: Logits) -> dict[str, Any]:
    difference = np.abs(found - expected)
    return {
        "max_abs_difference": float(difference.max()),
        "mean_abs_difference": float(difference.mean()),
        "greedy_agreement": float((found.argmax(1) == expected.argmax(1)).mean()),
    }


def _bundle_logits(engine: Engine, fusion: Mapping[str, float], ids: Sequence[int]) -> Logits:
    engine.decoder.set_fusion(engine.fuser.fuse(fusion))
    engine.decoder.truncate(0)
    return engine.decoder.all_logits(ids)


class _Reference:
    """The source in transformers, and PEFT on top of it once adapters are fused."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        with suppress_output():
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()

    def load(self, adapters: Sequence[PeftAdapter]) -> None:
        """Loads the adapters, under names that PEFT accepts as attributes of a module."""
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
        """Logits [S, V] after each of the ids; PEFT adds the adapters of the fusion, each scaled
        by its weight."""
        if fusion:
            self._model.base_model.set_adapter([self._names[name] for name in fusion])
            weights = {self._names[name]: weight for name, weight in fusion.items()}
            for scaling, own in self._scalings:
                scaling.update({name: own[name] * weights.get(name, 0.0) for name in own})
        output: Logits = self._model(torch.tensor([list(ids)])).logits[0].float().numpy()
        return output
