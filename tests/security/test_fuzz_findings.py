"""What fuzzing has found, tried again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dlp_edge import BundleError, Runtime
from dlp_edge.runtime.engine.ort_errors import first_line
from tests.security.fuzz.targets import KEPT, PARTS, TARGETS


def test_a_dimension_whose_name_is_no_text() -> None:
    """It passed the validator, and onnxruntime's bindings raised UnicodeDecodeError over it."""
    name = b"batch_size"
    data = (KEPT / "backbone.onnx").read_bytes()
    assert name in data
    bad = data.replace(name, b"\x80" + name[1:])
    TARGETS["runtime"](bytes([PARTS.index("backbone.onnx")]) + data)
    TARGETS["runtime"](bytes([PARTS.index("backbone.onnx")]) + bad)


@pytest.mark.slow
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


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_weights_that_are_finite_and_overflow() -> None:
    """numpy warned on stderr; the answer ends with a typed error."""
    from safetensors.numpy import load, save

    adapters = (KEPT / "adapters.safetensors").read_bytes()
    header = json.loads(adapters[8 : 8 + int.from_bytes(adapters[:8], "little")])
    tensors = {
        name: np.full_like(value, np.finfo(value.dtype).max)
        for name, value in load(adapters).items()
    }
    TARGETS["runtime"](
        bytes([PARTS.index("adapters.safetensors")]) + save(tensors, header["__metadata__"])
    )
