"""Supported backbones, and the mapping from PEFT's module names to the exported graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dlp_edge.errors import BackboneError

# Names of architectures in a GGUF file, where Mistral is a Llama.
GGUF_NAMES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
# Architectures (`config.json`: "architectures") whose graph, as the onnxruntime-genai builder
# writes it, has the node names below and rotary embedding inside GroupQueryAttention. transformers
# reads the last two from no GGUF file.
SUPPORTED = (*GGUF_NAMES, "SmolLM3ForCausalLM", "GraniteForCausalLM")
# RoPE scalings that the builder exports correctly. It silently mistranslates `linear` and `yarn`;
# `dynamic` and `longrope` change only beyond the length that an export compares.
ROPE_TYPES = ("default", "llama3")


@dataclass(frozen=True)
class Projection:
    """One linear layer of a decoder layer.

    Attributes:
        module: its name within the layer in transformers and PEFT.
        node: prefix of its node within the layer of the graph.
        packed: prefix of the node that packs it with others of the same input, if the builder
            packs them.
    """

    module: str
    node: str
    packed: str | None = None


PROJECTIONS = (
    Projection("self_attn.q_proj", "attn/q_proj", "attn/qkv_proj"),
    Projection("self_attn.k_proj", "attn/k_proj", "attn/qkv_proj"),
    Projection("self_attn.v_proj", "attn/v_proj", "attn/qkv_proj"),
    Projection("self_attn.o_proj", "attn/o_proj"),
    Projection("mlp.gate_proj", "mlp/gate_proj", "mlp/gate_up_proj"),
    Projection("mlp.up_proj", "mlp/up_proj", "mlp/gate_up_proj"),
    Projection("mlp.down_proj", "mlp/down_proj"),
)
# Phi-3 stores two or three of them as one.
FUSED_PROJECTIONS = (
    Projection("self_attn.qkv_proj", "attn/qkv_proj"),
    Projection("mlp.gate_up_proj", "mlp/gate_up_proj"),
)
FUSED_MLP = ("Phi3ForCausalLM",)  # architectures whose MLP is built with one matrix for both
PROJECTION_OF = {projection.module: projection for projection in (*PROJECTIONS, *FUSED_PROJECTIONS)}


def module_name(layer: int, module: str) -> str:
    """The full name of a linear layer in transformers, for example
    `model.layers.0.self_attn.q_proj`."""
    return f"model.layers.{layer}.{module}"


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise BackboneError unless the architecture of a `config.json` is supported."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if first not in SUPPORTED:
        raise _not_supported(f"architecture is {first}", SUPPORTED)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # Gemma 3 has one for each kind of attention.
    each = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for one in each:
        kind = one.get("rope_type") or one.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise _not_supported(f"rotary embedding is scaled as {kind}", ROPE_TYPES)


def check_supported_gguf(architecture: str) -> None:
    """Raise BackboneError unless the `general.architecture` of a GGUF file is supported."""
    if architecture not in GGUF_NAMES.values():
        raise _not_supported(f"architecture is {architecture}", sorted(set(GGUF_NAMES.values())))


def _not_supported(what: str, known: Iterable[str]) -> BackboneError:
    return BackboneError(
        f"the backbone's {what}, which is not supported", f"Use one of: {', '.join(known)}"
    )
