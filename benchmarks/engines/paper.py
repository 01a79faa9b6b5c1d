"""The paper's own way, as its authors' code does it: for every layer a Python loop over the
adapters, in torch and fp32. Kinder than that code: with a KV cache, and each adapter's own scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.engines.transformers_peft import CausalLoop
from dlp_edge.bundle.peft_reader import read_adapter


class LoopedLinear(torch.nn.Module):
    """A linear layer with its adapters' pairs (A [r, h], scaled B [d, r]) by name."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.weights: Mapping[str, float] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x)
        for name, weight in self.weights.items():
            a, b = self.pairs[name]
            result = result + weight * ((x @ a.T) @ b.T)
        return result


class Paper(CausalLoop):
    def __init__(self, folder: str, adapters: Mapping[str, str], room: int, threads: int) -> None:
        """Loads the model and all adapters (folders, by name); `room` grows by itself."""
        super().__init__(folder, threads)
        linears = {
            name: module
            for name, module in self.model.model.named_modules(prefix="model")
            if isinstance(module, torch.nn.Linear)
        }
        sizes = {
            name: (module.in_features, module.out_features) for name, module in linears.items()
        }
        self._looped: dict[str, LoopedLinear] = {}
        for adapter, path in adapters.items():
            for name, pair in read_adapter(adapter, Path(path), sizes).pairs.items():
                if name not in self._looped:
                    self._looped[name] = LoopedLinear(linears[name])
                    self.model.set_submodule(name, self._looped[name])
                a, b = torch.from_numpy(pair.a), torch.from_numpy(pair.b.T * pair.scaling)
                self._looped[name].pairs[adapter] = (a, b.contiguous())

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        for layer in self._looped.values():
            layer.weights = {name: w for name, w in weights.items() if name in layer.pairs}
