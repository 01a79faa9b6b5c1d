"""CUDA graphs: a step that was captured once is launched again as a whole, not node by node.

A captured graph reads and writes where the step did that it was captured from. So onnxruntime is
told a number with every pass, and the same one only for steps whose tensors all lie in the same
places, with the same shapes (`gpu_graph_id` in its documentation of the CUDA provider).
"""

from __future__ import annotations

from collections.abc import Hashable

import onnxruntime as ort

NOT_CAPTURED = -1  # the number of a pass that is neither captured nor replayed
_GRAPH_ID = "gpu_graph_id"


class CudaGraphs:
    """The numbers of a session's captured graphs."""

    def __init__(self) -> None:
        self._graph_ids: dict[Hashable, int] = {}

    def graph_id(self, places: Hashable) -> int:
        """The number for steps over tensors in these places."""
        return self._graph_ids.setdefault(places, len(self._graph_ids) + 1)


def set_graph_id(options: ort.RunOptions, graph_id: int) -> None:
    options.add_run_config_entry(_GRAPH_ID, str(graph_id))


def uses_cuda_graphs(session: ort.InferenceSession) -> bool:
    """Whether the session was opened for it."""
    provider = session.get_provider_options().get("CUDAExecutionProvider", {})
    return str(provider.get("enable_cuda_graph", "0")) == "1"
