"""The source under transformers, with its adapters under PEFT: what a bundle is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dlp_edge.bundle.peft_reader import PeftAdapter
from dlp_edge.export.mapped_model import mapped_model, stream_in_fp32
from dlp_edge.export.suppress_output import suppress_output

TOGETHER = 4  # sequences in one pass; logits of more would not fit in memory at a large vocabulary
Logits = npt.NDArray[np.float32]


class Reference:
    """Computes in fp32, with one layer's weights in memory at a time."""

    def __init__(self, folder: Path) -> None:
        self._model, weights = mapped_model(folder)
        stream_in_fp32(self._model, weights)

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

    @torch.no_grad()
    def most_probable(self, sequences: Sequence[Sequence[int]]) -> Iterator[npt.NDArray[np.int64]]:
        """The most probable next token at each position of each sequence, by the base model.

        Sequences are padded at the end, which no earlier position sees.
        """
        for start in range(0, len(sequences), TOGETHER):
            group = sequences[start : start + TOGETHER]
            padded = torch.zeros(len(group), max(map(len, group)), dtype=torch.long)
            for row, ids in enumerate(group):
                padded[row, : len(ids)] = torch.tensor(ids)
            tokens = self._model(padded).logits.argmax(-1).numpy()
            yield from (tokens[row, : len(ids)] for row, ids in enumerate(group))
