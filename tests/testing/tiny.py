"""A tiny random backbone, adapters of every shape for it, and tasks for its router."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.testing.families import make_adapter

# name -> LoraConfig arguments: different rank, alpha, targets, one rsLoRA, one over some layers.
ADAPTERS: dict[str, dict[str, Any]] = {
    "sums": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "sql": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"},
    "email": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "use_rslora": True,
        "layers_to_transform": [1],
    },
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}<|assistant|>"
)


def make_tiny_backbone(folder: Path) -> Path:
    """A random two-layer Llama with grouped-query attention, a tied head and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id("<|end|>"),
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def make_tiny_adapters(backbone: Path, folder: Path) -> dict[str, Path]:
    """Random PEFT adapters as in `ADAPTERS`."""
    return {
        name: make_adapter(backbone, folder / name, **settings)
        for name, settings in ADAPTERS.items()
    }


def make_parrot(backbone: Path, folder: Path) -> Path:
    """A new adapter that fits the tiny bundle's slots."""
    return make_adapter(backbone, folder / "parrot", r=3, lora_alpha=6)


def make_tiny_tasks(folder: Path) -> Path:
    """Task files with the adapters' names."""
    rng = random.Random(0)
    makers: dict[str, Callable[[], dict[str, str]]] = {
        "sums": lambda: _pair(
            f"Tom has {rng.randint(2, 99)} apples and buys {rng.randint(2, 99)}. How many?",
            "He starts with some. Then he adds more. The answer is a number.",
        ),
        "sql": lambda: _pair(
            f"Select the {rng.choice(['name', 'age', 'city'])} of row {rng.randint(2, 99)}",
            "SELECT it FROM table;",
        ),
        "email": lambda: _pair(
            f"Write an email to {rng.choice(['Ann', 'Bob'])} about day {rng.randint(2, 99)}",
            "Dear friend, it is late. Kind regards.",
        ),
    }
    for name, make in makers.items():
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 60), ("dev", 20)):
            lines = "".join(json.dumps(make()) + "\n" for _ in range(count))
            (folder / name / f"{split}.jsonl").write_text(lines)
    return folder


def _pair(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}
