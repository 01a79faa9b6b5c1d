"""What the decoder asks of a fuser, and which one a backbone needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

from dlp_edge.bundle.adapter_stack import AdapterStack
from dlp_edge.runtime.engine.backbone import Backbone
from dlp_edge.runtime.engine.bound_tensor import DeviceTensor
from dlp_edge.runtime.fusion.copying import CopyingFuser
from dlp_edge.runtime.fusion.in_place import InPlaceFuser
from dlp_edge.runtime.fusion.on_device import OnDeviceFuser

FusionInputs = Mapping[str, npt.NDArray[Any] | DeviceTensor]  # graph input -> tensor [G, ...]


class Fuser(Protocol):
    """Fuses adapters for each of G sequences (eq. 6 of arXiv 2410.01497).

    `fuse` and `move` return the graph inputs of all G sequences. They are views of buffers that
    the next call overwrites.
    """

    @property
    def shared_inputs(self) -> Mapping[str, npt.NDArray[Any]]:
        """Graph inputs that no fusion changes; bound once."""

    def fuse(self, weights: Mapping[str, float], sequence: int = 0) -> FusionInputs:
        """Give one sequence the adapters with these weights; {} is the base model."""

    def move(self, source: int, target: int) -> FusionInputs:
        """Copy the fusion of one sequence to another."""

    def sibling(self, sequences: int) -> Fuser:
        """A fuser for another number of sequences that shares this one's adapters."""


def make_fuser(backbone: Backbone, stack: AdapterStack, sequences: int) -> Fuser:
    """The fuser for the backbone's graph and device; all sequences start on the base model."""
    entry, device = backbone.entry, backbone.device
    if backbone.custom_operators:
        return InPlaceFuser(stack, entry.slots, sequences)
    if device.kind == "cpu":
        return CopyingFuser(stack, entry.slots, entry.dtype, sequences)
    if device.kind == "webgpu":
        return CopyingFuser(stack, entry.slots, entry.dtype, sequences, least_rank=1)
    return OnDeviceFuser(stack, entry.slots, entry.dtype, device, sequences)
