"""What an export measured: sizes, parity with transformers + PEFT, loss by quantisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from dlp_edge.export.adapters import PeftAdapter
from dlp_edge.export.quiet import quiet
from dlp_edge.export.source import Source
from dlp_edge.runtime.decoder import Decoder
from dlp_edge.runtime.fusion import Fuser

HELDOUT = Path(__file__).with_name("heldout.txt")
PARITY_TOKENS = 200
PERPLEXITY_TOKENS = 1024
Logits = npt.NDArray[np.float32]


def measure(
    source: Source,
    adapters: Sequence[PeftAdapter],
    tokenizer: Tokenizer,
    decoder: Decoder,
    fuser: Fuser,
) -> dict[str, Any]:
    """Compares the exported graph with the source under transformers and PEFT, in fp32.

    The fusion compared is the first two adapters at 0.6 and 0.4 (the only one at 1.0).

    Returns:
        `perplexity` (source, bundle, ratio, tokens) of the base model on the held-out text;
        `parity`: for base and fusion, the largest and mean |difference| of the logits and the
        share of positions with the same most probable token.
    """
    text = HELDOUT.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    ids = ids[: min(PERPLEXITY_TOKENS, decoder.max_context)]
    fusion = dict(zip([adapter.name for adapter in adapters[:2]], (0.6, 0.4), strict=False))
    if len(fusion) == 1:
        fusion = dict.fromkeys(fusion, 1.0)

    reference = _Reference(source.folder)
    expected = reference.logits(ids)
    found = _bundle_logits(decoder, fuser, {}, ids)
    parity = {"base": _differences(found[:PARITY_TOKENS], expected[:PARITY_TOKENS])}
    if fusion:
        reference.fuse(adapters[:2], fusion)
        short = ids[:PARITY_TOKENS]
        fused = _differences(_bundle_logits(decoder, fuser, fusion, short), reference.logits(short))
        parity["fusion"] = {"weights": fusion, **fused}
    before, after = perplexity(expected, ids), perplexity(found, ids)
    return {
        "perplexity": {
            "tokens": len(ids) - 1,
            "source": before,
            "bundle": after,
            "ratio": after / before,
        },
        "parity": {"tokens": len(ids[:PARITY_TOKENS]), **parity},
    }


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


def _bundle_logits(
    decoder: Decoder, fuser: Fuser, fusion: Mapping[str, float], ids: Sequence[int]
) -> Logits:
    decoder.set_fusion(fuser.fuse(fusion))
    decoder.truncate(0)
    return decoder.all_logits(ids)


class _Reference:
    """The source in transformers, and PEFT on top of it once adapters are fused."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        with quiet():
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()

    def fuse(self, adapters: Sequence[PeftAdapter], weights: Mapping[str, float]) -> None:
        """Loads the adapters and lets PEFT add all of them, each scaled by its weight."""
        from peft import PeftModel

        first, *others = adapters
        with quiet():
            model = PeftModel.from_pretrained(self._model, first.folder, adapter_name=first.name)
            for adapter in others:
                model.load_adapter(adapter.folder, adapter_name=adapter.name)
        model.base_model.set_adapter([adapter.name for adapter in adapters])
        for layer in model.modules():
            scaling = getattr(layer, "scaling", None)
            if isinstance(scaling, dict):
                for name, weight in weights.items():
                    if name in scaling:
                        scaling[name] *= weight
        self._model = model.eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits [S, V] after each of the ids."""
        output: Logits = self._model(torch.tensor([list(ids)])).logits[0].float().numpy()
        return output
