"""llama.cpp through llama-cpp-python's low-level interface, which has adapters side by side."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import llama_cpp as api
import numpy as np

from benchmarks.engines.interface import Logits, TokenLoop, mean_loss


class Llama(TokenLoop):
    def __init__(self, model: str, adapters: Mapping[str, str], room: int, threads: int) -> None:
        """Loads the model and all adapters (GGUF files, by name)."""
        quiet = api.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # llama.cpp holds no reference
        api.llama_log_set(quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        settings = api.llama_model_default_params()
        settings.load_mode = api.LLAMA_LOAD_MODE_MMAP
        self._model = _there(api.llama_model_load_from_file(model.encode(), settings), model)
        self._adapters = {
            name: _there(api.llama_adapter_lora_init(self._model, path.encode()), path)
            for name, path in adapters.items()
        }
        context = api.llama_context_default_params()
        context.n_ctx = room
        context.n_batch = room
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context.no_perf = True
        self._context = _there(api.llama_init_from_model(self._model, context), model)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        count = len(weights)
        adapters = (api.llama_adapter_lora_p_ctypes * count)(
            *(
                ctypes.cast(self._adapters[name], api.llama_adapter_lora_p_ctypes)
                for name in weights
            )
        )
        scales = (ctypes.c_float * count)(*weights.values())
        if api.llama_set_adapters_lora(self._context, adapters, count, scales):
            raise RuntimeError("llama.cpp refuses the adapters")

    def prefill(self, ids: Sequence[int]) -> int:
        self._clear()
        return int(self._read(ids).argmax())

    def step(self, token: int) -> int:
        return int(self._read([token]).argmax())

    def loss(self, ids: Sequence[int]) -> float:
        self._clear()
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position] = token
            batch.pos[position] = position
            batch.n_seq_id[position] = 1
            batch.seq_id[position][0] = 0
            batch.logits[position] = 1
        self._decode(batch)
        found = mean_loss(self._logits(len(ids)), ids)
        api.llama_batch_free(batch)
        return found

    def _clear(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self._context), False)

    def _read(self, ids: Sequence[int]) -> Logits:
        """Appends tokens; returns the logits [V] after the last one."""
        tokens = (api.llama_token * len(ids))(*ids)
        self._decode(api.llama_batch_get_one(tokens, len(ids)))
        return self._logits(1)[0]

    def _decode(self, batch: api.llama_batch) -> None:
        if api.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp cannot read these tokens")

    def _logits(self, rows: int) -> Logits:
        """The logits [rows, V] of the last pass."""
        pointer = api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (rows, self._vocabulary))


def _there(pointer: int | None, what: str) -> int:
    if not pointer:
        raise RuntimeError(f"llama.cpp cannot load {what}")
    return pointer
