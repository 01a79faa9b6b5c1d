"""Tiny random backbones of every supported family, as transformers makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.testing.paths import DATA

TOKENIZER = DATA / "bytes.json"
EOS = 256
CONTEXT = 256
WINDOW = 48

COMMON: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (model type of transformers, what differs from COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "llama2": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama3": ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE}),
    "llama-biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied-mha": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3-untied-mha": (
        "qwen3",
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 16},
    ),
    "qwen3-windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": WINDOW},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": CONTEXT, "sliding_window": WINDOW}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True, "no_rope_layers": [1, 0]}),
    "granite": (
        "granite",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
}


def make_backbone(family: str, folder: Path, **settings: Any) -> Path:
    """Writes a family's random model, norms and biases included, and a byte tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**COMMON, **changes, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # zeros and ones would hide a mistake
                weights += 0.2 * torch.randn_like(weights)
    model.save_pretrained(folder)
    Tokenizer.from_file(str(TOKENIZER)).save(str(folder / "tokenizer.json"))
    return folder


def make_adapter(backbone: Path, folder: Path, **settings: Any) -> Path:
    """Writes a PEFT adapter with random weights (not PEFT's zero B)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(folder.name))
    base = AutoModelForCausalLM.from_pretrained(backbone)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    get_peft_model(base, config).save_pretrained(folder)
    return folder
