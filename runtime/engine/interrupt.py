"""Stopping a request from another thread."""

from __future__ import annotations

import threading

import onnxruntime as ort

from dlp_edge.runtime.engine.cuda_graphs import set_graph_id


class Cancelled(Exception):  # noqa: N818 - a signal, not an error
    """A pass through the backbone, or the wait for one, was stopped because it was asked to."""


class Interrupt:
    """Set once, from any thread, it ends a request; a running pass stops at its next node.

    Attributes:
        options: what onnxruntime is to run the request's passes with.
    """

    def __init__(self) -> None:
        self.options = ort.RunOptions()
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()
        self.options.terminate = True

    def is_set(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises Cancelled once it is set."""
        if self._event.is_set():
            raise Cancelled


def run_bound(
    session: ort.InferenceSession,
    binding: ort.IOBinding,
    interrupt: Interrupt | None,
    capture: int | None = None,
) -> None:
    """One pass over what is bound. Raises Cancelled where the interrupt ended it.

    Args:
        capture: the number of the pass's CUDA graph, in a session that captures them.
    """
    options = interrupt.options if interrupt is not None else None
    if capture is not None:
        options = options or ort.RunOptions()
        set_graph_id(options, capture)
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:
        if interrupt is not None and interrupt.is_set():
            raise Cancelled from error
        raise
