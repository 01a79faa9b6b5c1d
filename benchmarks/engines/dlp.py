"""dlp-edge's own engine, loaded from a bundle as `Runtime` loads it, checksums and all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.engines.interface import TokenLoop, mean_loss
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.runtime.engine.device import choose_device
from dlp_edge.runtime.loaded_bundle import load
from dlp_edge.runtime.memory import CacheBudgets


class Dlp(TokenLoop):
    def __init__(self, bundle: str, room: int, threads: int) -> None:
        opened = open_bundle(Path(bundle))
        device = choose_device("cpu", opened.manifest.target, threads)
        self._engine = load(opened, device, room, CacheBudgets(), lambda *_: None).engine

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        self._engine.decoder.set_fusion(self._engine.fuser.fuse(weights))

    def prefill(self, ids: Sequence[int]) -> int:
        self._engine.decoder.truncate(0)
        return int(self._engine.decoder.prefill(ids).argmax())

    def step(self, token: int) -> int:
        return int(self._engine.decoder.step([token])[0].argmax())

    def loss(self, ids: Sequence[int]) -> float:
        self._engine.decoder.truncate(0)
        return mean_loss(self._engine.decoder.all_logits(ids), ids)
