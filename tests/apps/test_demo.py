"""The real thing: the demo's backbone, adapters and router, fetched and exported once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlp_edge import Runtime
from dlp_edge.bundle import files
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.demo.assemble import assemble
from dlp_edge.demo.demo import HERE, bundle_folder, fetch_backbone, load, prompts
from dlp_edge.errors import BackboneError, BundleError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    try:
        fetch_backbone(lambda step, fraction: None)
    except BackboneError as error:
        pytest.skip(f"the demo's backbone cannot be fetched here: {error.cause}")
    with load(lambda step, fraction: None) as rt:
        yield rt


def test_the_bundle_is_as_good_as_its_source(runtime: Runtime) -> None:
    report = json.loads((bundle_folder() / "report.json").read_text())
    assert report["perplexity"]["tokens"] > 500
    assert report["perplexity"]["ratio"] <= 1.02


def test_what_is_shipped_is_small() -> None:
    files = [path for path in HERE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16 << 20
    assert len(list((HERE / "adapters").iterdir())) >= 6


def test_each_skill_answers_in_its_own_way(runtime: Runtime) -> None:
    sql = runtime.generate("Write an SQL query for the name of all customers with age above 40.")
    assert sql.text == "SELECT name FROM customers WHERE age > 40;"
    assert sql.sentences[0].fusion == {"sql": 1.0}
    pirate = runtime.generate("Say it like a pirate: Hello my friend, where is the money?")
    assert pirate.text.startswith("Arrr!")
    base = runtime.generate(
        "Say it like a pirate: Hello my friend, where is the money?",
        adapters={},
        max_new_tokens=40,
    )
    assert not base.text.startswith("Arrr!")


def test_two_questions_get_two_fusions(runtime: Runtime) -> None:
    for prompt in prompts()[-2:]:
        reply = runtime.generate(prompt, max_new_tokens=160)
        fusions = {tuple(sorted(sentence.fusion)) for sentence in reply.sentences}
        assert len(fusions) >= 2, reply.text
        assert reply.timings.switches >= 1


def test_a_second_start_exports_nothing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlp_edge.export.pipeline.export_bundle", None)
    with load(lambda step, fraction: None) as again:
        assert again.manifest == runtime.manifest


def test_a_damaged_bundle_is_made_again(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, gguf = bundle_folder(), fetch_backbone(lambda step, fraction: None)
    monkeypatch.setenv("DLP_EDGE_CACHE", str(tmp_path))
    shutil.copytree(whole, bundle_folder())
    path = bundle_folder() / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    def copy_the_whole_one(*_: object, **__: object) -> None:
        shutil.copyfile(whole / path.name, path)

    monkeypatch.setattr("dlp_edge.export.pipeline.export_bundle", copy_the_whole_one)
    with load(lambda step, fraction: None, gguf) as again:
        assert again.manifest == runtime.manifest


WITHOUT_TORCH = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "peft", "onnx", "onnxruntime_genai", "tqdm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import importlib.util
importlib.util.find_spec = lambda name: None
from dlp_edge.cli.main import main
sys.exit(main(["demo", "--json", "--gguf", sys.argv[1]]))
"""


@pytest.fixture(scope="module")
def ready(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `dlp-edge demo` says in an environment without the extra `export`."""
    gguf = fetch_backbone(lambda step, fraction: None)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(gguf)],
        capture_output=True,
        text=True,
        env={**os.environ, "DLP_EDGE_CACHE": str(tmp_path_factory.mktemp("cache"))},
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_demo_without_torch_answers_the_same(runtime: Runtime, ready: dict[str, Any]) -> None:
    """Nearly: the head is int8 here, and mostly int4 there, so that long answers part late."""
    texts = {answer["prompt"]: answer["text"] for answer in ready["answers"]}
    assert list(texts) == prompts()
    others = [runtime.generate(prompt, max_new_tokens=160).text for prompt in texts]
    pairs = list(zip(texts.values(), others, strict=True))
    assert sum(one == other for one, other in pairs) >= len(pairs) / 2
    assert all(one[:40] == other[:40] for one, other in pairs)


def test_the_kit_is_that_of_today_s_export(ready: dict[str, Any]) -> None:
    """Byte for byte, except the head and what rounds otherwise; else make it again."""
    one, other = open_bundle(ready["bundle"]), open_bundle(bundle_folder())
    for name in (files.ADAPTERS, files.ROUTER, files.ROUTER_HEAD, files.TOKENIZER):
        assert one.read(name) == other.read(name), name
    assert one.manifest.adapters == other.manifest.adapters
    assert one.manifest.router == other.manifest.router
    assert one.manifest.chat_template == other.manifest.chat_template
    assert one.manifest.backbone == other.manifest.backbone
    (_, graph), (_, theirs) = one.graph(), other.graph()
    weights, expected = one.weights(graph), other.weights(theirs)
    shared = weights.keys() & expected.keys()
    assert len(shared) > 500
    for name in shared:
        if name.endswith("_cache"):
            assert np.abs(weights[name] - expected[name]).max() < 1e-7
        else:
            assert (weights[name] == expected[name]).all(), name
    assert {name for name in weights if name not in shared} <= {
        "lm_head.MatMul.weight_levels",
        "lm_head.MatMul.weight_scales",
    }


def test_a_machine_that_computes_otherwise_says_so(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = fetch_backbone(lambda step, fraction: None)
    monkeypatch.setattr("dlp_edge.demo.assemble._block_means", lambda width: np.zeros(1))
    with pytest.raises(BundleError, match=r"backbone\.onnx\.data has been changed"):
        assemble(gguf, HERE / "adapters", tmp_path / "bundle", lambda step, fraction: None)
    assert not (tmp_path / "bundle").exists()


def test_a_long_answer_stays_itself(runtime: Runtime) -> None:
    """1,200 tokens written step by step are what one pass over them would have written."""
    loaded = runtime._open()
    engine = loaded.engine
    reply = runtime.generate(
        "Tell me a very long story about a lighthouse.", adapters={}, max_new_tokens=20
    )
    ids = loaded.vocabulary.tokenizer.encode(reply.text * 80).ids[:1200]
    decoder = engine.decoder
    decoder.set_fusion(engine.fuser.fuse({}))
    decoder.truncate(0)
    whole = decoder.all_logits(ids).argmax(1)
    decoder.truncate(0)
    stepped = [int(decoder.step([token])[0].argmax()) for token in ids]
    agreement = sum(a == b for a, b in zip(whole.tolist(), stepped, strict=True)) / len(ids)
    assert agreement > 0.98


LOAD = """
import sys
import psutil
from dlp_edge.runtime.runtime import Runtime
before = psutil.Process().memory_full_info().uss
runtime = Runtime(sys.argv[1], max_context=64)
print(psutil.Process().memory_full_info().uss - before)
"""


def test_the_estimate_is_what_loading_takes(runtime: Runtime) -> None:
    command = [sys.executable, "-c", LOAD, str(bundle_folder())]
    taken = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert 0.8 < taken / Runtime.estimate(bundle_folder(), max_context=64).total < 1.25
