"""`export --to vllm` and `convert --to vllm`: what a folder for vLLM holds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dlp_edge_vllm.fuse import read_skill
from dlp_edge_vllm.store import FusionStore
from safetensors.numpy import load_file, save_file

from dlp_edge import Runtime
from dlp_edge.bundle.manifest import SelectionRule
from dlp_edge.cli.main import main
from dlp_edge.errors import AdapterError
from dlp_edge.export.vllm.capacity import capacity_of, most_selected
from dlp_edge.front.skills import RoutedSkills
from tests.testing.tiny import make_tiny_backbone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tiny_backbone: Path, tiny_adapters: dict[str, Path], tiny_router: Path) -> list[str]:
    words = ["--backbone", str(tiny_backbone), "--router", str(tiny_router)]
    for name, folder in tiny_adapters.items():
        words += ["--adapter", f"{name}={folder}"]
    return words


@pytest.fixture(scope="module")
def exported(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vllm") / "export"
    assert main(["export", "--to", "vllm", *sources, "-o", str(out), "--quiet"]) == 0
    return out


def test_the_model_is_the_source_with_our_template(exported: Path, tiny_backbone: Path) -> None:
    expected = load_file(tiny_backbone / "model.safetensors")
    found = load_file(exported / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
    template = (tiny_backbone / "chat_template.jinja").read_text()
    assert (exported / "model" / "chat_template.jinja").read_text() == template


def test_a_template_of_ones_own_goes_along(sources: list[str], tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    words = ["export", "--to", "vllm", *sources, "--chat-template", str(tmp_path / "own.jinja")]
    assert main([*words, "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert (tmp_path / "out/model/chat_template.jinja").read_text() == template
    skills = RoutedSkills.load(tmp_path / "out", 4096)
    assert skills.encoder.render([{"role": "user", "content": "Hi"}]) == "[Hi]"


def test_the_skills_are_the_adapters(exported: Path, tiny_adapters: dict[str, Path]) -> None:
    assert {path.name for path in (exported / "skills").iterdir()} == set(tiny_adapters)
    for name, source in tiny_adapters.items():
        expected, found = read_skill(source)[1], read_skill(exported / "skills" / name)[1]
        assert found.keys() == expected.keys()
        for module, pair in expected.items():
            np.testing.assert_allclose(
                found[module].b @ found[module].a, pair.b @ pair.a, rtol=1e-5, atol=1e-7
            )


def test_peft_reads_them(
    exported: Path, tiny_backbone: Path, tiny_adapters: dict[str, Path]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(40)[None] + 30
    for name in ("sql", "email"):
        logits = []
        for folder in (tiny_adapters[name], exported / "skills" / name):
            model: Any = AutoModelForCausalLM.from_pretrained(tiny_backbone)
            peft: Any = PeftModel.from_pretrained(model, folder)
            with torch.no_grad():
                logits.append(peft(ids).logits)
        assert float((logits[0] - logits[1]).abs().max()) < 1e-4


def test_the_router_is_the_bundles(exported: Path, tiny_bundle: Path) -> None:
    skills = RoutedSkills.load(exported, 4096)
    with Runtime(tiny_bundle) as runtime:
        for text in ("Write an email to Ann.", "Tom has 3 apples.", "Select row 7"):
            assert skills.router is not None
            found = skills.router.classify(text, "").probabilities
            assert found == pytest.approx(runtime.route(text).probabilities, abs=1e-5)


def test_the_launch_file_says_what_the_skills_need(exported: Path, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nenv | grep -E "^(VLLM|DLP_EDGE)_"\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [str(exported / "serve.sh"), "--dtype", "float32"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(fake), "PORT": "8123"},
    )
    lines = done.stdout.splitlines()
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in lines
    assert f"DLP_EDGE_SKILLS={exported}/skills" in lines
    # Three skills of ranks 8, 4 and 2; the rule can select two.
    assert "DLP_EDGE_MAX_RANK=12" in lines
    for flag, value in [
        ("--model", f"{exported}/model"),
        ("--served-model-name", "base"),
        ("--max-lora-rank", "16"),
        ("--max-model-len", "512"),
        ("--host", "127.0.0.1"),
        ("--port", "8123"),
        ("--dtype", "float32"),
    ]:
        assert lines[lines.index(flag) + 1] == value
    page = (exported / "serve.md").read_text()
    assert "| `--max-lora-rank` | 16 |" in page


def test_every_fusion_of_the_front_is_one_that_the_plugin_makes(
    exported: Path, tmp_path: Path
) -> None:
    manifest = RoutedSkills.load(exported, 4096).manifest
    store = FusionStore(exported / "skills", tmp_path / "fusions", 10, manifest.max_rank)
    assert manifest.max_skills == 2
    assert store.folder_of("sql@0.60+sums@0.40") is not None  # the two largest
    assert store.folder_of("email@0.35+sql@0.35+sums@0.30") is None


def test_a_bundle_converts_to_the_same(
    tiny_bundle: Path, tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "converted"
    words = ["convert", str(tiny_bundle), "--to", "vllm", "--backbone", str(tiny_backbone)]
    assert main([*words, "-o", str(out), "--json", "--quiet"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["skills"] == ["sums", "sql", "email"]
    assert written["max_lora_rank"] == 16
    skills = RoutedSkills.load(out, 4096)
    with Runtime(tiny_bundle) as runtime:
        assert skills.router is not None
        found = skills.router.classify("Tom has 3 apples.", "").probabilities
        assert found == runtime.route("Tom has 3 apples.").probabilities


def test_an_export_without_skills_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    words = ["export", "--to", "vllm", "--backbone", str(tiny_backbone), "--quiet"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 3
    assert list(tmp_path.iterdir()) == []


def test_another_backbone_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    other = make_tiny_backbone(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", {"format": "pt"})
    words = ["convert", str(tiny_bundle), "--to", "vllm", "--backbone", str(other)]
    assert main([*words, "-o", str(tmp_path / "out"), "--quiet"]) == 3
    assert not (tmp_path / "out").exists()


def test_options_of_bundles_are_refused(sources: list[str], tmp_path: Path) -> None:
    words = ["export", "--to", "vllm", *sources, "-o", str(tmp_path / "out"), "--quiet"]
    for more in (["--quant", "int8"], ["--fast"], ["--dry-run"], ["--target", "cuda"]):
        assert main([*words, *more]) == 2
    assert not (tmp_path / "out").exists()


def test_only_an_export_is_replaced(exported: Path, sources: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    words = ["export", "--to", "vllm", *sources, "--quiet", "-o"]
    assert main([*words, str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "file").read_text() == "x"
    assert main([*words, str(exported)]) == 0
    assert RoutedSkills.load(exported, 4096).router is not None


@pytest.mark.parametrize(
    ("rule", "labels", "most"),
    [
        (SelectionRule(p=0.6), 7, 5),
        (SelectionRule(p=0.6), 1, 1),
        (SelectionRule(p=1.0), 4, 4),
        (SelectionRule(select="threshold", p=0.3), 7, 3),
        (SelectionRule(select="threshold", p=0.9), 7, 1),
        (SelectionRule(select="top_k", k=2), 7, 2),
        (SelectionRule(select="top_k", k=9), 7, 7),
    ],
)
def test_how_many_skills_a_rule_can_select(rule: SelectionRule, labels: int, most: int) -> None:
    assert most_selected(rule, labels) == most


def test_the_rank_is_one_that_vllm_has() -> None:
    def found(*ranks: int, k: int = 2) -> tuple[int, int, int]:
        capacity = capacity_of(ranks, SelectionRule(select="top_k", k=k), {})
        return capacity.max_skills, capacity.max_rank, capacity.lora_rank

    assert found(8, 8, 8) == (2, 16, 16)
    assert found(8, 64, 4) == (2, 72, 128)
    assert found(300, 300, 16) == (1, 300, 320)  # two do not fit
    assert found(*[8] * 20, k=20) == (8, 64, 64)
    for wrong in ((513,), ()):
        with pytest.raises(AdapterError):
            found(*wrong)
