"""transformers + PEFT in fp32: what an adapter's author has, and the measure of perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.engines.interface import TokenLoop, mean_loss


class CausalLoop(TokenLoop):
    """A causal model of transformers with its KV cache."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._cache = DynamicCache()

    def prefill(self, ids: Sequence[int]) -> int:
        self._cache = DynamicCache()
        return self._read(ids)

    def step(self, token: int) -> int:
        return self._read([token])

    @torch.inference_mode()
    def loss(self, ids: Sequence[int]) -> float:
        return mean_loss(self.model(torch.tensor([ids])).logits[0].numpy(), ids)

    @torch.inference_mode()
    def _read(self, ids: Sequence[int]) -> int:
        output = self.model(
            torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return int(output.logits[0, -1].argmax())


class TransformersPeft(CausalLoop):
    """PEFT's fastest way for several adapters: their concatenation as one adapter."""

    def __init__(self, folder: str, adapters: Mapping[str, str], room: int, threads: int) -> None:
        """Loads the model and all adapters (folders, by name); `room` grows by itself."""
        super().__init__(folder, threads)
        self._fused: dict[str, str] = {}
        if not adapters:
            return
        # PEFT takes no names with dots or dashes.
        self._names = {name: f"adapter_{index}" for index, name in enumerate(adapters)}
        (first, path), *others = adapters.items()
        base = self.model
        self.model = PeftModel.from_pretrained(base, path, adapter_name=self._names[first])
        for name, path in others:
            self.model.load_adapter(path, adapter_name=self._names[name])
        self.model.eval()

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        if not isinstance(self.model, PeftModel):
            if weights:
                raise ValueError("no adapters were loaded")
            return
        if not weights:
            self.model.base_model.disable_adapter_layers()
            return
        key = repr(sorted(weights.items()))
        if key not in self._fused:
            self._fused[key] = self._fuse(weights)
        self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(self._fused[key])
        self.model.eval()
        self.model.requires_grad_(False)

    def _fuse(self, weights: Mapping[str, float]) -> str:
        name = f"fused_{len(self._fused)}"
        names = [self._names[adapter] for adapter in weights]
        self.model.add_weighted_adapter(names, list(weights.values()), name, combination_type="cat")
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer) and name in layer.scaling:
                # All scaling is in the weights now; with rsLoRA PEFT would scale once more.
                layer.scaling[name] = 1.0
        return name
