"""A transformers model whose weights stay in their files, mapped into memory.

Pages are read when a layer needs them and given back afterwards, so that a model of any size takes
the memory of one layer.
"""

from __future__ import annotations

import mmap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dlp_edge.errors import BackboneError
from dlp_edge.export.suppress_output import suppress_output
from dlp_edge.untrusted.safetensors_header import Header, header_size, parse_header

RELEASE_SECONDS = 0.2  # between two releases while a library reads the weights in its own order

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


class MappedWeights:
    """The tensors of a folder's *.safetensors, in the type that they are stored in."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            BackboneError: a file is malformed.
        """
        self.tensors: dict[str, torch.Tensor] = {}
        self._maps: list[mmap.mmap] = []
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._map(path)
            except (OSError, ValueError) as error:
                raise BackboneError(f"{path} cannot be read ({error})", "Restore it") from error

    def _map(self, path: Path) -> None:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = header_size(data[:8], len(data))
        header: Header = parse_header(data[8 : 8 + length], len(data) - 8 - length)
        self._maps.append(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "the buffer is not writable": nothing writes to it
            whole = torch.frombuffer(data, dtype=torch.uint8)
        content = whole[8 + length :]
        for name, info in header.tensors.items():
            flat = content[info.start : info.stop]
            if flat.data_ptr() % _TYPES[info.dtype].itemsize:
                flat = flat.clone()  # a view needs aligned bytes
            self.tensors[name] = flat.view(_TYPES[info.dtype]).view(info.shape)

    def release(self) -> None:
        """Give the resident pages back to the system; they are read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for data in self._maps:
                data.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def releasing(self) -> Iterator[None]:
        """Release pages again and again while the block runs."""
        stopped = threading.Event()

        def work() -> None:
            while not stopped.wait(RELEASE_SECONDS):
                self.release()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            self.release()


def mapped_model(folder: Path) -> tuple[Any, MappedWeights]:
    """The causal language model of a folder, with its weights mapped.

    Raises:
        BackboneError: a weight is missing or has another shape than the configuration says.
    """
    with suppress_output():
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

    weights = MappedWeights(folder)
    try:
        with suppress_output():
            config = AutoConfig.from_pretrained(folder)
            with init_empty_weights(include_buffers=False):
                model: Any = AutoModelForCausalLM.from_config(config)
            missing = model.load_state_dict(weights.tensors, strict=False, assign=True).missing_keys
            model.tie_weights()
    except Exception as error:  # the libraries raise many types
        raise BackboneError(
            f"the weights do not fit the configuration ({type(error).__name__}: {error})",
            "Restore the model's folder",
        ) from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if lost := sorted(set(missing) - tied):
        raise BackboneError(f"{folder} lacks the weights of {lost[0]}", "Restore it")
    return model.eval(), weights


def stream_in_fp32(model: Any, weights: MappedWeights) -> None:
    """Compute in fp32, one layer at a time: each layer's weights are converted before it runs, and
    dropped after it."""
    decoder = model.get_decoder()
    rest = [module for name, module in decoder.named_children() if name != "layers"]
    for module in [*decoder.layers, *rest, model.get_output_embeddings()]:
        _stream(module, weights)


def _stream(module: torch.nn.Module, weights: MappedWeights) -> None:
    stored: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def before(module: torch.nn.Module, *_: object) -> None:
        for parameter in module.parameters():
            if parameter.dtype != torch.float32:
                stored.append((parameter, parameter.data))
                parameter.data = parameter.data.float()

    def after(*_: object) -> None:
        for parameter, data in stored:
            parameter.data = data
        stored.clear()
        weights.release()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
