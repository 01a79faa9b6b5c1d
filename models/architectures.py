"""The backbones that can be exported, and how PEFT's module names map to the exported graph."""

from __future__ import annotations

from dataclasses import dataclass

from dlp_edge.errors import BackboneError

# Architectures (`config.json`: "architectures") whose graph, as the onnxruntime-genai builder
# writes it, has the node names below and rotary embedding inside GroupQueryAttention.
SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class Projection:
    """One linear layer of a decoder layer.

    Attributes:
        module: its name within the layer, as transformers and PEFT have it.
        node: the prefix of its own node within the layer of the graph.
        packed: the prefix of the node that holds it together with others of the same input,
            where the builder packs them.
    """

    module: str
    node: str
    packed: str | None = None


PROJECTIONS = (
    Projection("self_attn.q_proj", "attn/q_proj", "attn/qkv_proj"),
    Projection("self_attn.k_proj", "attn/k_proj", "attn/qkv_proj"),
    Projection("self_attn.v_proj", "attn/v_proj", "attn/qkv_proj"),
    Projection("self_attn.o_proj", "attn/o_proj"),
    Projection("mlp.gate_proj", "mlp/gate_proj"),
    Projection("mlp.up_proj", "mlp/up_proj"),
    Projection("mlp.down_proj", "mlp/down_proj"),
)
PROJECTION_OF = {projection.module: projection for projection in PROJECTIONS}


def module_name(layer: int, module: str) -> str:
    """The full name of a linear layer in transformers, for example
    `model.layers.0.self_attn.q_proj`."""
    return f"model.layers.{layer}.{module}"


def check_supported(architectures: object) -> None:
    """Raises BackboneError unless `config.json`'s "architectures" begins with a supported one."""
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    if first not in SUPPORTED:
        raise BackboneError(
            f"the backbone's architecture is {first}, which is not supported",
            f"Use one of: {', '.join(SUPPORTED)}",
        )
