"""onnxruntime-genai's own loop. It cannot fuse adapters: one graph has one adapter at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime_genai as og

from benchmarks.engines.interface import TokenLoop, mean_loss


class Genai(TokenLoop):
    def __init__(self, folder: str, room: int, threads: int) -> None:
        config = og.Config(folder)
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = og.Model(config)
        self._room = room
        self._generator = self._begin()

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        if weights:
            raise ValueError("onnxruntime-genai fuses no adapters")

    def prefill(self, ids: Sequence[int]) -> int:
        self._generator = self._begin()
        self._generator.append_tokens(ids)
        return self._next()

    def step(self, token: int) -> int:
        return self._next()

    def loss(self, ids: Sequence[int]) -> float:
        """Token by token: the graph gives the logits of the last position only."""
        generator = self._begin()
        logits = []
        for token in ids[:-1]:
            generator.append_tokens([token])
            logits.append(generator.get_logits()[0, -1])
        return mean_loss(np.array(logits), ids)

    def _begin(self) -> og.Generator:
        parameters = og.GeneratorParams(self._model)
        # With min_length no end of an answer is taken.
        lengths = {"max_length": self._room, "min_length": self._room}
        parameters.set_search_options(do_sample=False, **lengths)
        return og.Generator(self._model, parameters)

    def _next(self) -> int:
        """Appends the token that was chosen last, unless it is a prompt's turn; chooses one."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])
