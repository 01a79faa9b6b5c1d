"""A tiny random backbone, PEFT adapters of every shape for it, a router, and their bundle."""

from __future__ import annotations

import gc
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from dlp_edge.runtime.engine.operators import OPERATORS_VARIABLE, find_operators
from tests.testing.families import make_adapter

# A busy machine is not a failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}<|assistant|>"
)

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


# What builds a model, and so needs torch.
TORCH_FIXTURES = {"tiny_backbone", "tiny_router", "tiny_bundle", "tiny_int8_bundle", "export_tiny"}
# Tests whose modules import torch, transformers, peft or onnx.
TORCH_FOLDER = "export"
TORCH_MODULES = {
    "test_adapters.py",
    "test_attacks.py",
    "test_backbones.py",
    "test_cuda.py",
    "test_operators.py",
    "test_parity.py",
    "test_policies.py",
    "test_scoring.py",
    "test_signing.py",
    "test_verify_graph.py",
}
FAST = "not slow"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m "not slow"` does not even import what needs torch."""
    if config.option.markexpr != FAST:
        return None
    needs_torch = collection_path.name in TORCH_MODULES or collection_path.name == TORCH_FOLDER
    return needs_torch or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what needs torch."""
    for item in items:
        path = item.path
        needs_torch = path.name in TORCH_MODULES or path.parent.name == TORCH_FOLDER
        if needs_torch or TORCH_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The fast tier fails if anything in it imported torch."""
    heavy = sorted({"torch", "transformers", "peft", "onnx"} & set(sys.modules))
    if session.config.option.markexpr == FAST and heavy:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nthe fast tier imported {', '.join(heavy)}", file=sys.stderr)


@pytest.fixture(autouse=True, scope="module")
def light_heap() -> Iterator[None]:
    """Loading and failing to load collect garbage; torch's and transformers' million objects
    would make that a third of a second each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=["own operator", "onnxruntime's"])
def operators(request: pytest.FixtureRequest) -> Iterator[bool]:
    """What a module's runtimes run on, one after the other."""
    own = request.param == "own operator"
    if own and find_operators() is None:
        pytest.skip("our own operator could not be built, or not for this processor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OPERATORS_VARIABLE, "1" if own else "0")
        yield own


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with grouped-query attention, a tied head and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
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


@pytest.fixture(scope="session")
def tiny_adapters(tiny_backbone: Path) -> dict[str, Path]:
    """Random PEFT adapters as in `ADAPTERS`."""
    return {
        name: make_adapter(tiny_backbone, tiny_backbone.parent / name, **settings)
        for name, settings in ADAPTERS.items()
    }


@pytest.fixture(scope="session")
def parrot(tiny_backbone: Path) -> Path:
    """An adapter that is in no bundle, but fits the tiny one's slots."""
    return make_adapter(tiny_backbone, tiny_backbone.parent / "parrot", r=3, lora_alpha=6)


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files with the adapters' names."""
    folder = tmp_path_factory.mktemp("tasks")
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
        (folder / name).mkdir()
        for split, count in (("train", 60), ("dev", 20)):
            lines = "".join(json.dumps(make()) + "\n" for _ in range(count))
            (folder / name / f"{split}.jsonl").write_text(lines)
    return folder


def _pair(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}


@pytest.fixture(scope="session")
def tiny_router(tiny_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dlp_edge.models.training import train_router

    out = tmp_path_factory.mktemp("router") / "router"
    train_router(tiny_tasks, out)
    return out


@pytest.fixture(scope="session")
def export_tiny(
    tiny_backbone: Path,
    tiny_adapters: dict[str, Path],
    tiny_router: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """The bundle of all of it in a format."""

    def export(quantisation: str) -> Path:
        from dlp_edge.export.pipeline import export_bundle

        out = tmp_path_factory.mktemp("bundle") / "tiny"
        export_bundle(str(tiny_backbone), tiny_adapters, tiny_router, out, quantisation)
        return out

    return export


@pytest.fixture(scope="session")
def tiny_bundle(export_tiny: Callable[[str], Path]) -> Path:
    """The fp32 bundle of all of it. Read-only: tests that change it copy it first."""
    return export_tiny("fp32")


@pytest.fixture(scope="session")
def tiny_int8_bundle(export_tiny: Callable[[str], Path]) -> Path:
    """The same in int8: what our own operator is for."""
    return export_tiny("int8")


@pytest.fixture(scope="module")
def either_bundle(operators: bool, tiny_bundle: Path, tiny_int8_bundle: Path) -> Path:
    """A bundle for what a module's runtimes run on."""
    return tiny_int8_bundle if operators else tiny_bundle


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
