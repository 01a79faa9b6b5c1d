"""OpenVINO GenAI on a model of `openvino_model`; adapters are blended by its AdapterConfig."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as og

from benchmarks.engines.interface import Answer


class OpenVino:
    def __init__(
        self, folder: str, adapters: Mapping[str, tuple[str, float]], room: int, threads: int
    ) -> None:
        """Loads the model and all adapters (safetensors file and scaling, by name); `room` grows
        by itself."""
        self._folder = folder
        self._adapters = {name: og.Adapter(path) for name, (path, _) in adapters.items()}
        self._scaling = {name: scaling for name, (_, scaling) in adapters.items()}
        self._settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if adapters:
            self._settings["adapters"] = og.AdapterConfig(list(self._adapters.values()))
        stateful = {"ATTENTION_BACKEND": "SDPA"}
        self._pipeline = og.LLMPipeline(folder, "CPU", **self._settings, **stateful)
        self._fusion = og.AdapterConfig()

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        # The file says nothing of alpha and rank, so their quotient goes into the weight.
        self._fusion = og.AdapterConfig(
            [(self._adapters[name], w * self._scaling[name]) for name, w in weights.items()]
        )

    def generate(self, ids: Sequence[int], count: int) -> Answer:
        inputs = og.TokenizedInputs(_tensor([ids]), _tensor([[1] * len(ids)]))
        found = self._pipeline.generate(inputs, self._config(count))
        metrics = found.perf_metrics
        first = metrics.get_ttft().mean
        decode = metrics.get_tpot().mean * (count - 1) if count > 1 else 0.0
        return Answer(list(found.tokens[0]), first / 1e3, decode / 1e3)

    def loss(self, ids: Sequence[int]) -> float:
        """By the pipeline for several requests: the other one does not tell a prompt's
        probabilities."""
        scheduler = og.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.max_num_batched_tokens = len(ids)
        pipeline = og.ContinuousBatchingPipeline(
            self._folder, scheduler, "CPU", self._settings, {}, {}
        )
        config = self._config(1)
        pipeline.generate([_tensor([ids[:1]])], [config])  # only this call sets the adapters
        config.echo = True
        config.logprobs = 1
        handle = pipeline.add_request(0, _tensor([ids]), config)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        (found,) = handle.read_all()
        return -float(np.mean(found.generated_log_probs[1 : len(ids)]))

    def _config(self, count: int) -> og.GenerationConfig:
        config = og.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        if self._adapters:
            config.adapters = self._fusion
        return config


def _tensor(rows: Sequence[Sequence[int]]) -> ov.Tensor:
    return ov.Tensor(np.asarray(rows, np.int64))
