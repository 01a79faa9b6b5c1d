"""An export in bounded memory: layer by layer, resumable, with an estimate before it begins."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from dlp_edge.cli.verbs import export as verb
from dlp_edge.errors import BackboneError, ResourceError, UsageError
from dlp_edge.export import pipeline
from dlp_edge.export.backbone import DenseBackbone
from dlp_edge.export.card import write_card
from dlp_edge.export.mapped_model import MappedWeights, mapped_model, stream_in_fp32
from dlp_edge.export.pipeline import export_bundle
from dlp_edge.export.plan import Plan, plan_export
from dlp_edge.export.quantisation.activation_stats import first_pass
from dlp_edge.export.quantisation.layerwise import run_by_layer
from dlp_edge.export.report import verdict
from dlp_edge.export.source import adapter_folder, load_source
from dlp_edge.export.work_folder import work_folder
from tests.testing.families import make_backbone

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["llama2", "gemma2", "granite"])
def test_layer_by_layer_equals_one_pass(family: str, tmp_path: Path) -> None:
    import onnx

    folder = make_backbone(family, tmp_path / "backbone")
    with load_source(str(folder)) as source:
        dense = DenseBackbone(source, [], "cpu", tmp_path / "dense")
        graph = onnx.load(dense.path, load_external_data=False).graph
        head_size = dense.entry("fp32").head_size
    feeds = [first_pass(graph, range(count), head_size) for count in (7, 20)]
    inner = next(n.input[0] for n in graph.node if n.name.endswith("layers.1/mlp/down_proj/MatMul"))
    found = {}
    for values in run_by_layer(dense.path, feeds, [inner, "logits"]):
        found.update(values)
    session = ort.InferenceSession(str(dense.path))
    for feed, logits in zip(feeds, found["logits"], strict=True):
        # onnxruntime fuses other nodes where it sees all layers at once.
        np.testing.assert_allclose(logits, session.run(["logits"], feed)[0], atol=1e-5)
    assert found[inner][1].shape == (1, 20, 128)


def test_streaming_in_fp32_equals_a_model_in_memory(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_backbone("gemma2", tmp_path / "backbone", dtype="bfloat16")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    whole.save_pretrained(folder)
    ids = torch.arange(50)[None]
    model, weights = mapped_model(folder)
    assert {value.dtype for value in weights.tensors.values()} == {torch.bfloat16}
    stream_in_fp32(model, weights)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)  # the weights are as they were


def test_a_weight_that_is_missing(tmp_path: Path, tiny_backbone: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "backbone"))
    tensors = dict(load_file(folder / "model.safetensors"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BackboneError, match=r"lacks the weights of model\.layers\.1\.mlp\.up_proj"):
        mapped_model(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(BackboneError, match="cannot be read"):
        MappedWeights(folder)


def test_an_interrupted_export_resumes(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = export_bundle(str(tiny_backbone), {}, None, tmp_path / "straight", "int4")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.report, "compare", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(str(tiny_backbone), {}, None, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()
    for step in ("backbone.build_graph", "quantisation.int4.round_gptq"):
        monkeypatch.setattr(f"dlp_edge.export.{step}", interrupt)
    resumed = export_bundle(str(tiny_backbone), {}, None, tmp_path / "out", "int4")
    assert resumed["perplexity"] == straight["perplexity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]
    for name in ("backbone.onnx", "backbone.onnx.data"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_work_of_another_export_is_not_reused(tmp_path: Path) -> None:
    def stop(number: int, error: type[BaseException]) -> list[str]:
        found: list[str] = []
        with contextlib.suppress(error), work_folder(tmp_path / "out", {"n": number}) as work:
            found += [path.name for path in work.iterdir() if path.name != "key.json"]
            (work / "half").write_text("done")
            raise error
        return found

    assert stop(1, KeyboardInterrupt) == []
    assert stop(1, KeyboardInterrupt) == ["half"]
    assert stop(2, KeyboardInterrupt) == []
    assert stop(2, ValueError) == ["half"]
    assert list(tmp_path.iterdir()) == []


def test_a_fast_export_skips_the_greedy_answers(tiny_backbone: Path, tmp_path: Path) -> None:
    report = export_bundle(str(tiny_backbone), {}, None, tmp_path / "out", "int8", fast=True)
    assert report["perplexity"]["tokens"] == 255
    assert "greedy" not in report
    assert "milliseconds_per_token" not in report
    assert report["verdict"].startswith("good")


def test_calibration_text_changes_int4(tiny_backbone: Path, tmp_path: Path) -> None:
    text = "SELECT name FROM users WHERE age > 30;\n" * 40
    for name, calibration in (("own", None), ("given", text)):
        export_bundle(
            str(tiny_backbone), {}, None, tmp_path / name, "int4", calibration=calibration
        )
    own, given = ((tmp_path / n / "backbone.onnx.data").read_bytes() for n in ("own", "given"))
    assert own != given


def test_a_plan_is_near_what_comes_out(tiny_backbone: Path, tmp_path: Path) -> None:
    plan = plan_export(str(tiny_backbone), "int8")
    assert plan.architecture == "LlamaForCausalLM"
    export_bundle(str(tiny_backbone), {}, None, tmp_path / "out", "int8", fast=True)
    size = (tmp_path / "out" / "backbone.onnx.data").stat().st_size
    assert plan.bundle_bytes == pytest.approx(size, rel=0.5)  # tiny: tables and padding count
    with pytest.raises(UsageError, match="not here"):
        plan_export("somebody/model")


def test_too_little_memory_is_said_before_the_work(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlp_edge.export.plan.available", lambda: 10**6)
    with pytest.raises(ResourceError, match="GB of memory"):
        export_bundle(str(tiny_backbone), {}, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_the_largest_matrix(tiny_backbone: Path) -> None:
    plan: Plan = plan_export(str(tiny_backbone))
    assert plan.quantisation == "int8"
    assert sum(plan.source_types.values()) == 2 * 7 + 1
    assert plan.parameters == 260 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 128) + 64


def test_verdicts() -> None:
    assert verdict(1.003, 0.98).startswith("good: 1.003 times")
    assert verdict(1.05, 0.98).startswith("usable")
    assert verdict(1.3, 0.5).startswith("poor")


def test_a_format_that_loses_much_gets_a_remark() -> None:
    content = {"quantisation": "nf4", "perplexity": {"ratio": 1.2}}
    assert pipeline._losses(content, "nf4") == ["int8 loses less than nf4"]
    assert "the default here" in pipeline._losses(content, None)[0]
    assert pipeline._losses({**content, "quantisation": "int8"}, "int8") == []
    assert pipeline._losses({**content, "perplexity": {"ratio": 1.0}}, None) == []


def test_progress_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(verb.time, "monotonic", lambda: now)
    tell = verb.progress_lines()
    for seconds, fraction in ((1, 0.01), (6, 0.1), (7, 0.2), (60, 0.5), (70, 0.9)):
        now = 100.0 + seconds
        tell("working", fraction)
    assert capsys.readouterr().err.splitlines() == [
        "  1%  working",
        " 10%  working, about 54 s left",
        " 50%  working, about 60 s left",
        " 90%  working, about 8 s left",
    ]


def test_a_card_says_what_the_report_says(tiny_bundle: Path, tmp_path: Path) -> None:
    report = json.loads((tiny_bundle / "report.json").read_text())
    write_card(report, tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    for words in ("| sql | 8 |", report["verdict"], "fp32, for cpu", "(export.png)"):
        assert words in text
    assert (tmp_path / "card" / "export.png").read_bytes().startswith(b"\x89PNG")


def test_adapters_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert adapter_folder("somebody/lora-1.5") == tmp_path
    assert adapter_folder(str(tmp_path)) == tmp_path
    assert asked == [("somebody/lora-1.5", ["adapter_config.json", "adapter_model.safetensors"])]
