"""dlp-edge: one local language model with many LoRA skills, fused sentence by sentence.

    from dlp_edge import Runtime
    with Runtime("bundle/") as rt:
        print(rt.generate("...").text)

Importing this package does not load onnxruntime: public names are resolved on first use.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlp_edge.errors import (
        AdapterError,
        BackboneError,
        BundleError,
        BusyError,
        ContextLengthError,
        DeviceError,
        DeviceMemoryError,
        DlpEdgeError,
        ResourceError,
        RouterError,
        UsageError,
    )
    from dlp_edge.runtime.options import GenerateOptions, RouteOptions
    from dlp_edge.runtime.runtime import Runtime
    from dlp_edge.runtime.session import Session
    from dlp_edge.runtime.stream import AsyncStream, Stream
    from dlp_edge.types import (
        AdapterInfo,
        Chunk,
        Estimate,
        Likelihood,
        Message,
        Reply,
        RouteDecision,
        Sentence,
        Timings,
        Token,
        ToolCall,
        ToolCallPiece,
        Usage,
    )

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the application logs

_NAMES = {
    "dlp_edge.errors": (
        "AdapterError BackboneError BundleError BusyError ContextLengthError DeviceError "
        "DeviceMemoryError DlpEdgeError ResourceError RouterError UsageError"
    ),
    "dlp_edge.types": (
        "AdapterInfo Chunk Estimate Likelihood Message Reply RouteDecision Sentence Timings Token "
        "ToolCall ToolCallPiece Usage"
    ),
    "dlp_edge.runtime.options": "GenerateOptions RouteOptions",
    "dlp_edge.runtime.runtime": "Runtime",
    "dlp_edge.runtime.session": "Session",
    "dlp_edge.runtime.stream": "AsyncStream Stream",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "AsyncStream",
    "BackboneError",
    "BundleError",
    "BusyError",
    "Chunk",
    "ContextLengthError",
    "DeviceError",
    "DeviceMemoryError",
    "DlpEdgeError",
    "Estimate",
    "GenerateOptions",
    "Likelihood",
    "Message",
    "Reply",
    "ResourceError",
    "RouteDecision",
    "RouteOptions",
    "RouterError",
    "Runtime",
    "Sentence",
    "Session",
    "Stream",
    "Timings",
    "Token",
    "ToolCall",
    "ToolCallPiece",
    "Usage",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dlp_edge' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_MODULE_OF[name]), name)
    except ModuleNotFoundError as error:
        if error.name in ("dlp_edge.runtime", "dlp_edge.export", "dlp_edge.models"):
            raise ImportError(
                "dlp_edge is imported from a checkout that is not installed; "
                "run `pip install -e .` in it first"
            ) from error
        raise
