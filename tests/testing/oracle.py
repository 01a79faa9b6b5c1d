"""What exactness means: transformers + PEFT in fp32, adapters added with their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class Peft:
    """A PEFT model of a backbone and all its adapters."""

    def __init__(self, backbone: Path, adapters: Mapping[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)  # tiny models: more threads only wait for each other
        base = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
        (first, folder), *others = adapters.items()
        self.model: Any = PeftModel.from_pretrained(base, folder, adapter_name=first)
        for name, folder in others:
            self.model.load_adapter(folder, adapter_name=name)
        self.model.eval()
        self.model.base_model.set_adapter(list(adapters))
        self._layers = [
            (layer, dict(layer.scaling))
            for layer in self.model.modules()
            if isinstance(getattr(layer, "scaling", None), dict)
        ]
        self._cache: Any = None

    def fuse(self, weights: Mapping[str, float]) -> None:
        """From now on each adapter counts with its weight, the others not at all."""
        for layer, scaling in self._layers:
            for name, value in scaling.items():
                layer.scaling[name] = value * weights.get(name, 0.0)

    def logits(self, ids: Sequence[int], weights: Mapping[str, float]) -> npt.NDArray[np.float32]:
        """Logits [S, V] of one pass over the ids."""
        self.fuse(weights)
        with torch.no_grad():
            found: npt.NDArray[np.float32] = self.model(torch.tensor([list(ids)])).logits[0].numpy()
        return found

    def forget(self) -> None:
        """Empties the cache that `extend` fills."""
        self._cache = None

    def extend(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Appends tokens to the cache under the present fusion; logits [V] after the last."""
        with torch.no_grad():
            out = self.model(torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        last: npt.NDArray[np.float32] = out.logits[0, -1].numpy()
        return last
