"""CUDA graphs: a captured step is replayed as a whole instead of node by node.

A replay reads and writes the addresses of the captured step. Every pass therefore carries a graph
id, and passes share an id only if all their tensors have the same addresses and shapes (see
`gpu_graph_id` of onnxruntime's CUDA provider).
"""

from __future__ import annotations

from collections.abc import Hashable

import onnxruntime as ort

NOT_CAPTURED = -1  # the graph id of a pass that is neither captured nor replayed
_CONFIG_KEY = "gpu_graph_id"


class CudaGraphs:
    """Ids of the graphs that a session has captured."""

    def __init__(self) -> None:
        self._graph_ids: dict[Hashable, int] = {}

    def graph_id(self, locations: Hashable) -> int:
        """The id for steps whose tensors have these locations."""
        return self._graph_ids.setdefault(locations, len(self._graph_ids) + 1)


def set_graph_id(options: ort.RunOptions, graph_id: int) -> None:
    options.add_run_config_entry(_CONFIG_KEY, str(graph_id))


def uses_cuda_graphs(session: ort.InferenceSession) -> bool:
    """Whether the session was opened with CUDA graphs enabled."""
    provider = session.get_provider_options().get("CUDAExecutionProvider", {})
    return str(provider.get("enable_cuda_graph", "0")) == "1"
