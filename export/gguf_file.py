"""Converts a GGUF file to a Hugging Face folder with fp32 weights, one tensor at a time."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dlp_edge.errors import BackboneError, DlpEdgeError
from dlp_edge.export.suppress_output import suppress_output
from dlp_edge.models.architectures import check_supported_gguf

ROW_CHUNK = 4096  # rows of the largest tensors that are dequantised at a time
# The largest tensors; no supported family reorders their values.
_CHUNKED = ("token_embd.weight", "output.weight")

OnProgress = Callable[[float], None]


def open_gguf(path: Path) -> Any:
    """A reader of a file that can be exported.

    Raises:
        BackboneError: it is malformed, a part of a model, without a tokenizer, or its architecture
            is not supported.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader raises many types
        raise _unreadable(path, error) from error
    check_supported_gguf(str(_field(reader, "general.architecture")))
    parts = _field(reader, "split.count") or 1
    if parts > 1:
        raise BackboneError(
            f"{path.name} is one of {parts} parts of a model",
            "Merge the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    if reader.get_field("tokenizer.ggml.tokens") is None:
        raise BackboneError(f"{path.name} has no tokenizer", "Use a file that holds one")
    return reader


def dequantise_gguf(path: Path, out: Path, on_progress: OnProgress = lambda fraction: None) -> None:
    """Convert a GGUF file to a Hugging Face folder with fp32 weights.

    Args:
        on_progress: called with the fraction done.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with suppress_output():
        from accelerate import init_empty_weights

    reader = open_gguf(path)
    try:
        with suppress_output():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            with init_empty_weights():
                model = AutoModelForCausalLM.from_config(config)
        stored = config.to_dict()
        stored.pop("quantization_config", None)
        stored["architectures"] = [type(model).__name__]
        (out / "config.json").write_text(json.dumps(stored, indent=1), encoding="utf-8")
        tokenizer.save_pretrained(out)
        _write_weights(reader, model, stored, out / "model.safetensors", on_progress)
    except (OSError, DlpEdgeError):
        raise
    except Exception as error:  # the readers raise many types
        raise _unreadable(path, error) from error


def _write_weights(
    reader: Any, model: Any, config: dict[str, Any], out: Path, on_progress: OnProgress
) -> None:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.get("tie_word_embeddings"):  # a tied head is left out, as transformers does
        shapes.pop("lm_head.weight", None)
    family = str(_field(reader, "general.architecture"))
    processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    tensors = {names[t.name]: t for t in reader.tensors if names.get(t.name) in shapes}
    if lost := sorted(set(shapes) - set(tensors)):
        raise BackboneError(f"the GGUF file lacks the weights of {lost[0]}", "Restore it")
    for name, shape in shapes.items():
        if tuple(map(int, reversed(tensors[name].shape))) != shape:
            raise BackboneError(
                f"{name} is not {shape} in the GGUF file, as its metadata says",
                "Export the model's Hugging Face folder instead",
            )
    with out.open("wb") as file:
        _write_header(file, shapes)
        for index, name in enumerate(shapes):
            for part in _dequantised(tensors[name], processor):
                file.write(np.ascontiguousarray(part, np.float32).reshape(-1).data)
            _release(reader)
            on_progress((index + 1) / len(shapes))


def _dequantised(tensor: Any, processor: Any) -> Iterator[npt.NDArray[Any]]:
    """A tensor's values, in the order and scale that transformers expects."""
    from gguf import dequantize

    if tensor.name in _CHUNKED:
        for start in range(0, len(tensor.data), ROW_CHUNK):
            yield dequantize(tensor.data[start : start + ROW_CHUNK], tensor.tensor_type)
        return
    weights = dequantize(tensor.data, tensor.tensor_type)
    yield processor.process(weights=weights, name=tensor.name).weights


def _write_header(file: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _release(reader: Any) -> None:
    """Give the pages of the mapped file back to the system."""
    if hasattr(mmap, "MADV_DONTNEED"):
        reader.data._mmap.madvise(mmap.MADV_DONTNEED)


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return field.contents() if field else None


def _unreadable(path: Path, error: Exception) -> BackboneError:
    return BackboneError(
        f"{path.name} cannot be read ({type(error).__name__}: {error})",
        "Check that the file is complete, and its architecture supported",
    )
