"""Greedy answers of an exported graph to many prompts at once, for comparing formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dlp_edge.manifest import BackboneEntry
from dlp_edge.runtime.device import Device, open_session

PROMPTS = Path(__file__).with_name("prompts.txt")
NEW_TOKENS = 100


def prompts() -> list[str]:
    """Twenty things to ask, none of them in the calibration text."""
    return PROMPTS.read_text(encoding="utf-8").splitlines()


def greedy_answers(
    path: Path, entry: BackboneEntry, device: Device, asked: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """The `count` most probable tokens, one after the other, after each of the prompts `asked`,
    of the base model. All prompts run as one batch; the ends of answers are passed over."""
    session = open_session(path, device)
    lengths = np.asarray([len(ids) for ids in asked], np.int32)
    room = int(lengths.max()) + count
    shape = (len(asked), entry.num_kv_heads, room, entry.head_size)
    binding = session.io_binding()
    kept: list[ort.OrtValue] = []  # the binding holds no reference
    dtype = np.dtype(entry.dtype)
    for layer in range(entry.num_layers):
        for kind in ("key", "value"):
            cache = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
            binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", cache)
            binding.bind_ortvalue_output(f"present.{layer}.{kind}", cache)
            kept.append(cache)
    for slot in entry.slots:
        for name, width in (
            (f"{slot.name}.A", slot.input_size),
            (f"{slot.name}.B", slot.output_size),
        ):
            binding.bind_cpu_input(name, np.zeros((1, 0, width), dtype))

    def run(ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Logits [B, S, V] after ids [B, S], which end at `lengths`."""
        total = np.asarray(lengths.max(), np.int32)
        positions = np.arange(ids.shape[1], dtype=np.int64)
        logits = np.zeros((len(ids), ids.shape[1], entry.vocab_size), dtype)
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("seqlens_k", lengths - 1)
        binding.bind_cpu_input("total_sequence_length", total)
        binding.bind_cpu_input("logit_positions", positions)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        session.run_with_iobinding(binding)
        return logits

    padded = np.zeros((len(asked), int(lengths.max())), np.int64)
    for row, ids in zip(padded, asked, strict=True):
        row[: len(ids)] = ids
    last = run(padded)[np.arange(len(asked)), lengths - 1]
    answers = [[int(token)] for token in last.argmax(1)]
    for _ in range(count - 1):
        lengths = lengths + 1
        logits = run(np.asarray([[answer[-1]] for answer in answers], np.int64))
        for answer, token in zip(answers, logits[:, 0].argmax(1), strict=True):
            answer.append(int(token))
    return answers
