"""Benchmarks whose subject is a reference implementation, or another engine: they must compute
what they claim to."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.peft_reader import read_adapter
from dlp_edge.export.source import load_source
from tests.testing.paths import ROOT

pytestmark = pytest.mark.slow

IDS = list(range(20, 60))
FUSION = {"sums": 0.6, "sql": 0.4}


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gather", "dense"])
def test_token_gating_with_gates_of_zero_is_a_fusion_of_two(tiny_bundle: Path, way: str) -> None:
    from benchmarks.token_gating import difference

    assert difference(open_bundle(tiny_bundle), way, IDS) < 1e-3


@pytest.mark.slow
def test_engines_with_the_same_weights_and_adapters_agree(
    tiny_bundle: Path, tiny_backbone: Path, tiny_adapters: dict[str, Path]
) -> None:
    from benchmarks.engines.worker import do, load

    common = {"room": 128, "threads": 1}
    torch = common | {
        "folder": str(tiny_backbone),
        "adapters": {name: str(path) for name, path in tiny_adapters.items()},
    }
    engines = [
        load({"engine": "dlp", "bundle": str(tiny_bundle), **common}),
        load({"engine": "transformers_peft", **torch}),
        load({"engine": "paper", **torch}),
    ]
    found: dict[str, list[dict[str, Any]]] = {}
    for fusion in ({}, FUSION, {"email": 1.0}, {}):
        order = {"ids": IDS, "adapters": fusion}
        answers = [do(e, order | {"do": "generate", "count": 12}) for e in engines]
        losses = [do(engine, order | {"do": "loss"})["loss"] for engine in engines]
        assert answers[0]["tokens"] == answers[1]["tokens"] == answers[2]["tokens"]
        assert len(answers[0]["tokens"]) == 12
        assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
        found.setdefault(str(fusion), []).append({"loss": losses[0], **answers[0]})
    base, again = found["{}"]
    assert base["tokens"] == again["tokens"]
    assert len({answers[0]["loss"] for answers in found.values()}) == 3


@pytest.mark.slow
def test_a_process_answers_refuses_and_tells_why_it_ended(tiny_bundle: Path) -> None:
    from benchmarks.engines.process import EngineError, Process

    options = {"engine": "dlp", "bundle": str(tiny_bundle), "room": 64, "threads": 1}
    order = {"do": "generate", "ids": IDS, "count": 3, "adapters": {}}
    with Process(sys.executable, options) as process:
        with pytest.raises(EngineError, match="the cache holds 64 tokens"):
            process.ask(order | {"count": 60})
        answer = process.ask(order)
        assert len(answer["tokens"]) == 3
        assert answer["clock"] > process.begun
        ballast = np.ones(1 << 28, np.uint8)
        with Process(sys.executable, options) as other:  # what this process holds is not its own
            assert 1e7 < other.ask({"do": "peak"})["bytes"] < 2.5e8
        assert ballast[-1] == 1
    with (
        Process(sys.executable, options | {"bundle": "nowhere"}) as process,
        pytest.raises(EngineError, match="there is no bundle at nowhere"),
    ):
        process.ask(order)


def test_a_gguf_adapter_holds_the_pairs_in_llama_cpps_order(
    tiny_backbone: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    import gguf

    from benchmarks.engines.adapters import write_gguf

    with load_source(str(tiny_backbone)) as source:
        sizes = source.linear_sizes()
    pairs = read_adapter("sql", tiny_adapters["sql"], sizes).pairs
    write_gguf(pairs, 4, 2, tmp_path / "sql.gguf")

    reader = gguf.GGUFReader(tmp_path / "sql.gguf")
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"
    assert reader.get_field("adapter.lora.alpha").contents() == 8.0  # alpha, not alpha / r
    tensors = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in reader.tensors}
    assert len(tensors) == 2 * len(pairs) == 2 * 2 * 7
    down = pairs["model.layers.1.mlp.down_proj"]
    assert tensors["blk.1.ffn_down.weight.lora_a"] == pytest.approx(down.a, abs=1e-3)
    assert tensors["blk.1.ffn_down.weight.lora_b"] == pytest.approx(down.b.T, abs=1e-3)
    # k has two heads of 16 rows: 0, 8, 1, 9, ... of the first, then of the second.
    order = [16 * head + 8 * half + row for head in (0, 1) for row in range(8) for half in (0, 1)]
    k = pairs["model.layers.0.self_attn.k_proj"]
    assert tensors["blk.0.attn_k.weight.lora_b"] == pytest.approx(k.b.T[order], abs=1e-3)
    assert tensors["blk.0.attn_k.weight.lora_a"] == pytest.approx(k.a, abs=1e-3)


def test_a_gguf_adapter_has_one_alpha(
    tiny_backbone: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    from benchmarks.engines.adapters import write_gguf

    with load_source(str(tiny_backbone)) as source:
        sizes = source.linear_sizes()
    pairs = {
        module: pair
        for name in ("sql", "sums")
        for module, pair in read_adapter(name, tiny_adapters[name], sizes).pairs.items()
    }
    with pytest.raises(ValueError, match="one alpha"):
        write_gguf(pairs, 4, 2, tmp_path / "mixed.gguf")


def test_a_made_up_adapter_is_a_peft_adapter_of_its_targets(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    from benchmarks.engines.adapters import make_up

    with load_source(str(tiny_backbone)) as source:
        sizes = source.linear_sizes()
    every = {module.split(".")[-1] for module in sizes}
    make_up(tmp_path / "a", sizes, 16, every, seed=0)
    make_up(tmp_path / "b", sizes, 16, every, seed=1)
    make_up(tmp_path / "c", sizes, 8, ["q_proj", "v_proj"], seed=1)
    one, other, few = (read_adapter(name, tmp_path / name, sizes) for name in "abc")
    assert one.pairs.keys() == sizes.keys()
    assert {pair.a.shape[0] for pair in one.pairs.values()} == {16}
    assert one.sha256 != other.sha256
    assert few.entry.target_modules == ("self_attn.q_proj", "self_attn.v_proj")


def test_q8_copies_a_gguf_file_but_for_its_4_bits(tmp_path: Path) -> None:
    import gguf

    from benchmarks.engines.q8 import write_q8

    rng = np.random.default_rng(0)
    matrix, norm = rng.normal(size=(8, 64)).astype(np.float32), np.ones(64, np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("blk.0.attn_q.weight", gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    write_q8(tmp_path / "a.gguf", tmp_path / "b.gguf")

    before, after = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "b.gguf")
    for name in ("llama.block_count", "tokenizer.ggml.tokens", "general.architecture"):
        assert after.get_field(name).contents() == before.get_field(name).contents()
    assert [tensor.tensor_type.name for tensor in after.tensors] == ["Q8_0", "F32"]
    (four, _), (eight, same) = before.tensors, after.tensors
    assert same.data == pytest.approx(norm)
    assert gguf.quants.dequantize(eight.data, eight.tensor_type) == pytest.approx(
        gguf.quants.dequantize(four.data, four.tensor_type), abs=0.02
    )


def test_ratios_are_taken_within_rounds_and_as_far_as_both_went() -> None:
    from benchmarks.engines.summary import summarise

    def engine(decode: list[float], peak: list[float], loss: float) -> dict[str, Any]:
        return {
            "loss": {"base": loss},
            "decode_ms": {"base": decode},
            "prefill_ms": {},
            "long_prefill_ms": {},
            "start_s": [],
            "peak_bytes": peak,
        }

    found = {
        "llama.cpp": engine([10, 20, 40], [100, 100, 100], 2.0),
        "other": engine([5, 5], [150, 50, 120], 1.0 + np.log(2)),
        "transformers + PEFT": engine([50], [], 1.0),
    }
    ratios = summarise(found)
    assert ratios["other"]["decode, base"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    assert ratios["other"]["peak memory"] == {"median": 1.2, "least": 0.5, "most": 1.5}
    assert ratios["other"]["perplexity"] == {"base": pytest.approx(2.0)}
    assert ratios["transformers + PEFT"]["decode, base"]["median"] == 0.2
    assert ratios["llama.cpp"]["decode, base"]["median"] == 1.0
    assert "start" not in ratios["other"]


@pytest.mark.slow
def test_a_worker_of_some_cases_gets_their_adapters_only() -> None:
    from benchmarks.engines.prepare import CASES, Contestant

    names = sorted({name for fusion in CASES.values() for name in fusion})
    contestant = Contestant("x", "python", {"adapters": {name: name for name in names}}, "")
    assert contestant.options_of(list(CASES))["adapters"].keys() == set(names)
    assert contestant.options_of(["base"]) == {"adapters": {}}
    assert Contestant("y", "python", {"bundle": "b"}, "").options_of(["base"]) == {"bundle": "b"}


def test_a_watch_tells_others_work_from_that_of_the_process_watched() -> None:
    from benchmarks.engines.quiet import Watch

    quiet, busy = Watch(os.getpid()), Watch(os.getppid())
    begun = time.process_time()
    while time.process_time() - begun < 0.5:
        pass
    assert busy.others() > quiet.others() + 0.2


@pytest.mark.slow
def test_the_server_under_load(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    from benchmarks.serving import load, soak

    common = {"bundle": str(tiny_bundle), "url": None, "model": None, "options": []}
    load(Namespace(clients=4, tokens=8, **common))
    soak(Namespace(clients=6, tokens=20, minutes=0.05, **common))
    out = capsys.readouterr().out
    assert "side by side over one after another" in out
    assert "server alive: True" in out
    assert "of them other than alone: 0" in out
    assert "error" not in out
