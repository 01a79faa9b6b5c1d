"""Exporting: adapters that cannot be fused, failures half-way, what may be overwritten."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlp_edge.atomic.staging import check_space, staged
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.peft_reader import read_adapter, read_adapters
from dlp_edge.errors import (
    AdapterError,
    BackboneError,
    BundleError,
    ResourceError,
    RouterError,
    UsageError,
)
from dlp_edge.export.pipeline import export_bundle
from dlp_edge.export.source import load_source
from tests.testing.families import make_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sizes(tiny_backbone: Path) -> dict[str, tuple[int, int]]:
    with load_source(str(tiny_backbone)) as source:
        return source.linear_sizes()


@pytest.fixture
def adapter(tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an adapter that a test may damage."""
    return Path(shutil.copytree(tiny_adapters["sums"], tmp_path / "adapter"))


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def reweigh(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


Sizes = dict[str, tuple[int, int]]


def test_sizes_are_of_every_linear_layer(sizes: Sizes) -> None:
    assert len(sizes) == 2 * 7
    assert sizes["model.layers.0.self_attn.k_proj"] == (64, 32)
    assert sizes["model.layers.1.mlp.down_proj"] == (128, 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_what_a_pair_cannot_carry_is_refused_by_name(
    adapter: Path, sizes: Sizes, settings: dict[str, Any]
) -> None:
    configure(adapter, **settings)
    with pytest.raises(AdapterError, match=r"sums.*(IA3|" + next(iter(settings)) + ")"):
        read_adapter("sums", adapter, sizes)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": None},
        {"lora_alpha": [8]},
        {"lora_alpha": float("nan")},
        {"lora_alpha": True},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"(": 3}},
        {"r": 5},
        {"rank_pattern": {"q_proj": 7}},
    ],
    ids=str,
)
def test_settings_that_are_wrong(adapter: Path, sizes: Sizes, settings: dict[str, Any]) -> None:
    configure(adapter, **settings)
    with pytest.raises(AdapterError, match="adapter_config"):
        read_adapter("sums", adapter, sizes)


def test_weights_without_two_dimensions(adapter: Path, sizes: Sizes) -> None:
    reweigh(adapter, lambda t: t.update({min(t): np.zeros((), np.float32)}))
    with pytest.raises(AdapterError, match="must be matrices"):
        read_adapter("sums", adapter, sizes)


def test_an_adapter_that_does_something_else_under_peft(
    tiny_backbone: Path, adapter: Path, tmp_path: Path
) -> None:
    """PEFT adapts only the modules that the configuration names; the weights hold more."""
    configure(adapter, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="under PEFT"):
        export_bundle(str(tiny_backbone), {"sums": adapter}, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_names_another_backbone_is_remarked(
    tiny_backbone: Path, adapter: Path, tmp_path: Path
) -> None:
    configure(adapter, base_model_name_or_path="somebody/other-model")
    report = export_bundle(str(tiny_backbone), {"sums": adapter}, None, tmp_path / "out", "fp32")
    assert report["remarks"] == [
        "adapter sums was trained on somebody/other-model, this backbone is called tiny-llama"
    ]


def test_names_that_modules_have(tiny_backbone: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("v1.2", "items", "training"):
        export_bundle(str(tiny_backbone), {name: adapter}, None, tmp_path / name, "fp32")
        assert open_bundle(tmp_path / name).manifest.adapters[0].name == name


def test_scaling_follows_alpha_patterns_and_rslora(adapter: Path, sizes: Sizes) -> None:
    configure(adapter, use_rslora=True, alpha_pattern={"layers.1.self_attn.q_proj": 6})
    pairs = read_adapter("sums", adapter, sizes).pairs
    assert pairs["model.layers.1.self_attn.q_proj"].scaling == pytest.approx(6 / 2)
    assert pairs["model.layers.0.self_attn.q_proj"].scaling == pytest.approx(16 / 2)


def test_only_a_pickle_file(adapter: Path, sizes: Sizes) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter("sums", adapter, sizes)


def test_truncated_weights(adapter: Path, sizes: Sizes) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="cannot be read"):
        read_adapter("sums", adapter, sizes)


def test_no_adapter_at_all(tmp_path: Path, sizes: Sizes) -> None:
    with pytest.raises(AdapterError, match="adapter_config"):
        read_adapter("sums", tmp_path, sizes)


def test_weights_that_are_not_finite(adapter: Path, sizes: Sizes) -> None:
    reweigh(adapter, lambda tensors: next(iter(tensors.values())).fill(np.inf))
    with pytest.raises(AdapterError, match="not finite"):
        read_adapter("sums", adapter, sizes)


def test_half_a_pair(adapter: Path, sizes: Sizes) -> None:
    reweigh(adapter, lambda tensors: tensors.pop(min(tensors)))
    with pytest.raises(AdapterError, match="only one of lora_A and lora_B"):
        read_adapter("sums", adapter, sizes)


def test_no_module_at_all(adapter: Path, sizes: Sizes) -> None:
    reweigh(adapter, lambda tensors: tensors.clear())
    with pytest.raises(AdapterError, match="no module"):
        read_adapter("sums", adapter, sizes)


def test_a_module_that_the_backbone_has_not(adapter: Path, sizes: Sizes) -> None:
    fewer = {module: size for module, size in sizes.items() if ".0." in module}
    with pytest.raises(AdapterError, match=r"layers\.1.*matches no module"):
        read_adapter("sums", adapter, fewer)


def test_an_adapter_of_another_backbone(adapter: Path, sizes: Sizes) -> None:
    wider = {module: (2 * h, d) for module, (h, d) in sizes.items()}
    with pytest.raises(AdapterError, match="another backbone"):
        read_adapter("sums", adapter, wider)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a=b", "a,b", "x" * 65])
def test_names(adapter: Path, sizes: Sizes, name: str) -> None:
    with pytest.raises(AdapterError, match="name"):
        read_adapter(name, adapter, sizes)


def test_the_same_weights_twice(tiny_adapters: dict[str, Path], sizes: Sizes) -> None:
    folders = {"one": tiny_adapters["sums"], "two": tiny_adapters["sums"]}
    with pytest.raises(AdapterError, match=r"one.*two.*same weights"):
        read_adapters(folders, sizes)


def test_export_report(tiny_bundle: Path) -> None:
    report = json.loads((tiny_bundle / "report.json").read_text())
    assert report["perplexity"]["ratio"] == pytest.approx(1, abs=1e-3)
    for kind in ("base", "fusion"):
        assert report["parity"][kind]["max_abs_difference"] <= 1e-3
    assert [adapter["name"] for adapter in report["adapters"]] == ["sums", "sql", "email"]
    assert report["remarks"] == []


def test_a_router_for_other_adapters(
    tiny_backbone: Path, tiny_adapters: dict[str, Path], tiny_router: Path, tmp_path: Path
) -> None:
    some = {"sums": tiny_adapters["sums"]}
    with pytest.raises(RouterError, match="email, sql"):
        export_bundle(str(tiny_backbone), some, tiny_router, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "step",
    ["onnxruntime_genai.models.builder.create_model", "dlp_edge.bundle.adapter_stack.to_bytes"],
)
def test_a_failing_export_leaves_the_old_bundle_and_nothing_else(
    tiny_backbone: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in bundle_copy.iterdir()}

    def fill_the_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step, fill_the_disk)
    with pytest.raises(ResourceError, match="full"):
        export_bundle(str(tiny_backbone), {}, None, bundle_copy, quantisation="fp32")
    assert {path.name: path.stat().st_mtime_ns for path in bundle_copy.iterdir()} == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]


def test_a_foreign_folder_is_never_replaced(tiny_backbone: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not written by dlp-edge"):
        export_bundle(str(tiny_backbone), {}, None, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_killed_export_leaves_no_bundle(tiny_backbone: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dlp_edge.export.pipeline import export_bundle\n"
        "tell = lambda step, fraction: print(step, flush=True)\n"
        f"export_bundle({str(tiny_backbone)!r}, {{}}, None, Path({str(tmp_path / 'out')!r}),"
        " on_progress=tell)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("comparing"):
            os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "out")
    export_bundle(str(tiny_backbone), {}, None, tmp_path / "out", quantisation="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_staging_appears_only_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged(target, lambda folder: True) as staging:
        (staging / "a").write_text("new")
        assert not target.exists()
    assert (target / "a").read_text() == "new"

    def fail() -> None:
        with staged(target, lambda folder: True) as staging:
            (staging / "a").write_text("newer")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (target / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_export_killed_between_its_renames_is_put_right(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("old")
    (tmp_path / ".out.staging").mkdir()

    def fail() -> None:
        with staged(tmp_path / "out", lambda folder: True):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_to_one_target(tmp_path: Path) -> None:
    with staged(tmp_path / "out", lambda folder: True) as staging:
        (staging / "a").write_text("first")
        second = staged(tmp_path / "out", lambda folder: True)
        with pytest.raises(ResourceError, match="another process"):
            second.__enter__()
    assert (tmp_path / "out" / "a").read_text() == "first"


def test_too_little_space_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="GB free"):
        check_space(tmp_path / "out", 1 << 60)


@pytest.mark.parametrize(
    ("backbone", "words"),
    [("missing/folder/x", "no folder"), ("nothing.gguf", "no folder"), ("x.bin", "no folder")],
)
def test_a_backbone_that_is_not_there(backbone: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=words):
        export_bundle(backbone, {}, None, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["HuggingFaceTB/SmolLM2-1.7B-Instruct", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"]
)
def test_hub_ids_may_have_dots(
    name: str, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tiny_backbone)
    with load_source(name) as source:
        assert source.name == name


@pytest.mark.parametrize("damage", ["weights", "config", "template", "template text"])
def test_a_damaged_backbone(tiny_backbone: Path, tmp_path: Path, damage: str) -> None:
    other = Path(shutil.copytree(tiny_backbone, tmp_path / "other"))
    if damage == "weights":
        path = other / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "config":
        config = json.loads((other / "config.json").read_text())
        del config["max_position_embeddings"]
        (other / "config.json").write_text(json.dumps(config))
    elif damage == "template":
        (other / "chat_template.jinja").write_text("{% for %}")
    else:
        (other / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(BackboneError):
        export_bundle(str(other), {}, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_backbone_that_is_not_finite(
    tiny_backbone: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_backbone, tmp_path / "other"))
    tensors = dict(load_file(other / "model.safetensors"))
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="not finite"):
        export_bundle(str(other), tiny_adapters, None, tmp_path / "out", "fp32")


def test_special_tokens_are_those_of_the_tokenizer(tiny_backbone: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_backbone, tmp_path / "other"))
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (other / "tokenizer_config.json").write_text(json.dumps(tokens))
    with load_source(str(other)) as source:
        assert (source.bos_token, source.eos_token) == ("<s>", "</s>")


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(BackboneError, match=r"x\.gguf cannot be read"):
        export_bundle(str(tmp_path / "x.gguf"), {}, None, tmp_path / "out")


def test_adapters_made_by_peft_for_single_layers(
    tiny_backbone: Path, tmp_path: Path, sizes: Sizes
) -> None:
    folder = make_adapter(
        tiny_backbone,
        tmp_path / "pattern",
        r=4,
        lora_alpha=8,
        target_modules=r".*layers\.0\.mlp\.(up|down)_proj",
        rank_pattern={"up_proj": 2},
        alpha_pattern={"up_proj": 10},
    )
    pairs = read_adapter("pattern", folder, sizes).pairs
    assert {name: (p.a.shape[0], p.scaling) for name, p in pairs.items()} == {
        "model.layers.0.mlp.down_proj": (4, 2.0),
        "model.layers.0.mlp.up_proj": (2, 5.0),
    }
