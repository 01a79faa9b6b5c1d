"""The vLLM plugin: its fusions against PEFT's, its store, and how it enters vLLM."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from dlp_edge_vllm import plugin
from dlp_edge_vllm.fuse import CONFIG, WEIGHTS, fuse, read_skill
from dlp_edge_vllm.store import NOTE, FusionStore
from safetensors.numpy import load_file, save_file


@pytest.fixture
def skills(tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "skills"
    for name, source in tiny_adapters.items():
        shutil.copytree(source, folder / name)
    return folder


def store_of(skills: Path, **limits: int) -> FusionStore:
    settings = {"most": 100, "max_rank": 64, **limits}
    return FusionStore(skills, skills.parent / "fusions", **settings)


def delta(folder: Path) -> dict[str, Any]:
    """What a PEFT folder adds to each matrix."""
    return {module: pair.b @ pair.a for module, pair in read_skill(folder)[1].items()}


def written(store: FusionStore, name: str) -> Path:
    folder = store.folder_of(name)
    assert folder is not None
    return folder


def test_a_fusion_is_the_weighted_sum(skills: Path) -> None:
    """rsLoRA, mixed ranks and targets included."""
    folder = written(store_of(skills), "sql@0.60+email@0.25+sums@0.15")
    expected: dict[str, Any] = {}
    for name, weight in (("sql", 0.6), ("email", 0.25), ("sums", 0.15)):
        for module, matrix in delta(skills / name).items():
            expected[module] = expected.get(module, 0) + weight * matrix
    found = delta(folder)
    assert found.keys() == expected.keys()
    for module, matrix in expected.items():
        np.testing.assert_allclose(found[module], matrix, atol=1e-6)
    config = json.loads((folder / CONFIG).read_text())
    ranks = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in load_file(folder / WEIGHTS).items()
        if ".lora_A." in key
    }
    assert config["r"] == max(ranks.values())
    for module, rank in ranks.items():
        assert config["rank_pattern"].get(module, config["r"]) == rank


@pytest.mark.slow
def test_a_fusion_is_what_peft_concatenates(
    skills: Path, tiny_backbone: Path, tiny_adapters: dict[str, Path]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(40)[None] + 30
    weights = {"sql": 0.6, "sums": 0.4}
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    peft: Any = PeftModel.from_pretrained(model, tiny_adapters["sql"], adapter_name="sql")
    peft.load_adapter(tiny_adapters["sums"], adapter_name="sums")
    peft.add_weighted_adapter(list(weights), list(weights.values()), "both", "cat")
    peft.set_adapter("both")
    with torch.no_grad():
        expected = peft(ids).logits
    folder = written(store_of(skills), "sql@0.60+sums@0.40")
    again: Any = AutoModelForCausalLM.from_pretrained(tiny_backbone)
    fused: Any = PeftModel.from_pretrained(again, folder)
    with torch.no_grad():
        assert float((fused(ids).logits - expected).abs().max()) < 1e-4


def test_a_fusion_is_written_once_under_the_hash_of_its_parts(skills: Path) -> None:
    store = store_of(skills)
    folder = written(store, "sql@0.60+email@0.40")
    before = (folder / WEIGHTS).stat().st_mtime_ns
    assert written(store, "sql@0.60+email@0.40") == folder
    assert written(store_of(skills), "sql@0.60+email@0.40") == folder
    assert (folder / WEIGHTS).stat().st_mtime_ns == before
    assert json.loads((folder / NOTE).read_text())["name"] == "sql@0.60+email@0.40"
    assert written(store, "sql@0.65+email@0.35") != folder
    weights = load_file(skills / "sql" / WEIGHTS)
    save_file({key: 2 * tensor for key, tensor in weights.items()}, skills / "sql" / WEIGHTS)
    changed = written(store, "sql@0.60+email@0.40")
    assert changed != folder
    assert folder.is_dir()  # vLLM may read it again


def test_a_skill_alone_is_its_own_folder(skills: Path) -> None:
    assert written(store_of(skills), "sql") == skills / "sql"
    assert not list((skills.parent / "fusions").iterdir())


def test_what_is_too_large_or_one_too_many_is_not_made(skills: Path) -> None:
    assert store_of(skills, max_rank=9).folder_of("sql@0.60+email@0.40") is None  # 8 + 2
    store = store_of(skills, most=1)
    written(store, "sql@0.60+email@0.40")
    assert store.folder_of("sql@0.65+email@0.35") is None
    written(store, "sql@0.60+email@0.40")
    for name in ("nobody", "../skills/sql", "sql@0.6+email@0.4", "email@0.40+sql@0.60"):
        assert store.folder_of(name) is None
    assert [path.name[:1] for path in (skills.parent / "fusions").iterdir()] != ["."]


def test_many_may_ask_for_one_at_once(skills: Path) -> None:
    found: list[Path | None] = []
    stores = [store_of(skills) for _ in range(4)]  # as servers that share the folder
    threads = [
        threading.Thread(target=lambda s=store: found.append(s.folder_of("sql@0.55+sums@0.45")))
        for store in stores * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert set(found) == {written(stores[0], "sql@0.55+sums@0.45")}
    assert len(list((skills.parent / "fusions").iterdir())) == 1


def test_a_write_that_fails_leaves_nothing(skills: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(skills)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="space"):
        store.folder_of("sql@0.60+email@0.40")
    monkeypatch.undo()
    assert list((skills.parent / "fusions").iterdir()) == []
    written(store, "sql@0.60+email@0.40")


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"lora_bias": True}]
)
def test_other_adapters_are_refused(skills: Path, change: dict[str, Any]) -> None:
    path = skills / "sql" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="sql"):
        fuse({skills / "sql": 1.0})


def test_a_folder_without_skills_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no PEFT folders"):
        FusionStore(tmp_path, tmp_path / "fusions", 1, 1)


class Registry:
    resolvers: ClassVar[dict[str, Any]] = {}

    @classmethod
    def register_resolver(cls, name: str, resolver: Any) -> None:
        cls.resolvers[name] = resolver


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[Registry]:
    """The three names of vLLM that the plugin uses."""
    request = types.SimpleNamespace(LoRARequest=lambda *given: given)
    resolver = types.SimpleNamespace(LoRAResolver=object, LoRAResolverRegistry=Registry)
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", resolver)  # type: ignore[arg-type]
    Registry.resolvers = {}
    return Registry


def test_the_resolver_answers_for_fusions_only(
    skills: Path, vllm: type[Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(plugin.SKILLS, raising=False)
    plugin.register()
    assert vllm.resolvers == {}
    monkeypatch.setenv(plugin.SKILLS, str(skills))
    monkeypatch.setenv(plugin.FUSIONS, str(skills.parent / "fusions"))
    plugin.register()
    (resolver,) = vllm.resolvers.values()
    name, _, folder = asyncio.run(resolver.resolve_lora("base", "sql@0.60+email@0.40"))
    assert name == "sql@0.60+email@0.40"
    assert Path(folder, WEIGHTS).is_file()
    assert asyncio.run(resolver.resolve_lora("base", "../sql")) is None
    (skills / "sums" / WEIGHTS).write_bytes(b"damaged")
    assert asyncio.run(resolver.resolve_lora("base", "sql@0.60+sums@0.40")) is None
