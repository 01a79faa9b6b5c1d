"""PEFT adapters for a benchmark: made up where no real one has the shape, and as GGUF files."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from dlp_edge.bundle.adapter_stack import LoraPair
from dlp_edge.bundle.peft_reader import CONFIG, WEIGHTS

Matrix = npt.NDArray[np.floating]
# The layers' names in GGUF files of Llama models.
GGUF_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_up(
    folder: Path,
    sizes: Mapping[str, tuple[int, int]],
    rank: int,
    targets: Collection[str],
    seed: int,
) -> None:
    """Writes a PEFT adapter of small random numbers.

    Args:
        sizes: (inputs, outputs) of each linear layer.
        targets: which kinds of them it changes, as PEFT's `target_modules` names them.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (inputs, outputs) in sizes.items():
        if module.split(".")[-1] in targets:
            key = f"base_model.model.{module}.lora"
            a, b = rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank))
            tensors[f"{key}_A.weight"] = (a / np.sqrt(inputs)).astype(np.float32)
            tensors[f"{key}_B.weight"] = (0.01 * b).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": list(targets), "task_type": "CAUSAL_LM"}
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def write_gguf(pairs: Mapping[str, LoraPair], heads: int, kv_heads: int, path: Path) -> None:
    """Writes an adapter of a Llama model as llama.cpp reads it, in half precision.

    Args:
        pairs: module -> low-rank pair, all of one rank and scaling.
        heads, kv_heads: of the backbone; llama.cpp orders the rows of q and k otherwise.

    Raises:
        ValueError: the pairs differ in rank or scaling.
    """
    alphas = {pair.scaling * pair.a.shape[0] for pair in pairs.values()}
    if len(alphas) != 1:
        raise ValueError(f"a GGUF file holds one alpha, the adapter has {sorted(alphas)}")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alphas.pop())
    for module, pair in pairs.items():
        layer, kind = _parse(module)
        b = pair.b.T
        if kind == "self_attn.q_proj":
            b = interleave(b, heads)
        elif kind == "self_attn.k_proj":
            b = interleave(b, kv_heads)
        name = f"blk.{layer}.{GGUF_LAYERS[kind]}.weight"
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(pair.a, np.float16))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(rows: Matrix, heads: int) -> Matrix:
    """The rows of q or k [d, ...] as llama.cpp's rotary embedding pairs them: in each head those
    of the first and of the second half in turn."""
    size = len(rows) // heads
    halves = rows.reshape(heads, 2, size // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _parse(module: str) -> tuple[int, str]:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if found is None:
        raise ValueError(f"{module} is no layer of a Llama model")
    return int(found[1]), found[2]
