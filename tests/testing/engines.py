"""An engine without a `Runtime` around it: what tests of logits and caches drive."""

from __future__ import annotations

from pathlib import Path

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.files import BACKBONE
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.device import Device, choose_device


def make_engine_for(
    bundle: Path, context: int, sequences: int = 1, device: Device | None = None
) -> Engine:
    """A bundle's engine, on one thread of the CPU unless a device is given."""
    opened = open_bundle(bundle)
    graph = open_backbone(
        bundle / BACKBONE,
        opened.manifest.backbone,
        device or choose_device("cpu", "cpu", 1),
        reread=lambda: opened.weights(opened.graph()[1]),
    )
    return make_engine(graph, opened.adapters(), context, sequences)
