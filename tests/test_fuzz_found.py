"""What fuzzing has found, tried again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("fuzz")))
from targets import KEPT, PARTS, TARGETS

from dlp_edge import BundleError, Runtime
from dlp_edge.runtime.device import first_line


def test_a_dimension_whose_name_is_no_text() -> None:
    """It passed the validator, and onnxruntime's bindings raised UnicodeDecodeError over it."""
    name = b"batch_size"
    data = (KEPT / "backbone.onnx").read_bytes()
    assert name in data
    bad = data.replace(name, b"\x80" + name[1:])
    TARGETS["runtime"](bytes([PARTS.index("backbone.onnx")]) + data)
    TARGETS["runtime"](bytes([PARTS.index("backbone.onnx")]) + bad)


def test_a_router_that_onnxruntime_refuses() -> None:
    """Loading a bundle gave a RouterError."""
    import onnx

    model = onnx.load(KEPT / "router.onnx")
    cast = next(node for node in model.graph.node if node.op_type == "Cast")
    cast.attribute[0].i = 99
    TARGETS["runtime"](bytes([PARTS.index("router.onnx")]) + model.SerializeToString())


def test_an_end_token_that_the_tokenizer_does_not_know() -> None:
    """llguidance's ValueError came through (found by the soak test on the kept bundle)."""
    pytest.importorskip("llguidance")
    with Runtime(KEPT, threads=1) as runtime:
        with pytest.raises(BundleError, match="JSON schema"):
            runtime.generate("Count 3", json_schema={"type": "integer"})
        assert runtime.generate("Count 3", max_new_tokens=2).text


def test_errors_that_say_nothing() -> None:
    assert first_line(RuntimeError("")) == "RuntimeError"
    assert first_line(RuntimeError("\n one\ntwo")) == "one"
