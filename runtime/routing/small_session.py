"""An onnxruntime session for a network that takes a millisecond: one thread, on the CPU."""

from __future__ import annotations

import onnxruntime

from dlp_edge.native_calls import native_calls


def open_small(model: bytes) -> onnxruntime.InferenceSession:
    """A session for the bytes of a graph; raises what onnxruntime raises."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # to wake another would take longer
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with native_calls:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
