"""The seed corpus: the good twin of everything that is fuzzed."""

from __future__ import annotations

import json
from pathlib import Path

from dlp_edge.bundle import adapter_stack
from dlp_edge.bundle.bundle import open_bundle
from tests.security.fuzz.targets import KEPT, PARTS

_CHAT = {
    "format": "dlp-edge-session",
    "version": 1,
    "overflow": "error",
    "dropped": 0,
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}],
}
_SAMPLE = '{"prompt": "How many?", "response": "Two.", "choices": ["Two.", "Three."]}\n'


def write_seeds(target: str, folder: Path) -> None:
    """Writes the target's seeds into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds_of(target)):
        (folder / f"seed-{number}").write_bytes(seed)


def seeds_of(target: str) -> list[bytes]:
    """Inputs in which nothing is wrong."""
    if target in ("bundle", "runtime"):
        return [bytes([i]) + (KEPT / name).read_bytes() for i, name in enumerate(PARTS)]
    if target == "peft":
        return [_peft(name) for name in ("count", "greet")]
    return [json.dumps(_CHAT).encode()] if target == "session" else [2 * _SAMPLE.encode()]


def _peft(name: str) -> bytes:
    """An adapter of the kept bundle, as PEFT would have saved it."""
    from safetensors.numpy import save

    pairs = adapter_stack.unpack(open_bundle(KEPT).adapters(), name)
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = pair.a.copy()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b.T.copy()
    rank = max(pair.a.shape[0] for pair in pairs.values())
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "rank_pattern": {}, "bias": "none"}
    settings |= {"alpha_pattern": {".*q_proj": 4}, "use_rslora": True}
    config = json.dumps(settings).encode()
    return len(config).to_bytes(2, "little") + config + save(tensors)
