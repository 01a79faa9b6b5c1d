"""Cancel a request from another thread."""

from __future__ import annotations

import threading

import onnxruntime as ort

from dlp_edge.native_calls import native_calls
from dlp_edge.runtime.engine.cuda_graphs import set_graph_id


class Cancelled(Exception):  # noqa: N818 - a signal, not an error
    """The request was cancelled during a pass or while waiting for one."""


class Interrupt:
    """Cancels a request from any thread, for good; a running pass stops at its next node.

    Attributes:
        options: onnxruntime's run options for the request's passes.
    """

    def __init__(self) -> None:
        self.options = ort.RunOptions()
        self._event = threading.Event()
        native_calls.cancel_at_exit(self)

    def set(self) -> None:
        self._event.set()
        self.options.terminate = True

    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise Cancelled if it is set."""
        if self._event.is_set():
            raise Cancelled


def run_bound(
    session: ort.InferenceSession,
    binding: ort.IOBinding,
    interrupt: Interrupt | None,
    graph_id: int | None = None,
) -> None:
    """Run one pass over the bound tensors.

    Args:
        graph_id: the pass's CUDA graph id; None if the session captures none.

    Raises:
        Cancelled: the interrupt was set.
    """
    options = interrupt.options if interrupt is not None else None
    if graph_id is not None:
        options = options or ort.RunOptions()
        set_graph_id(options, graph_id)
    with native_calls:
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:
            if interrupt is not None and interrupt.is_set():
                raise Cancelled from error
            raise
