"""GGUF files of every quantisation, dequantised as transformers does; files that are refused."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from dlp_edge.errors import BackboneError, ResourceError
from dlp_edge.export.gguf_file import dequantise_gguf, open_gguf
from dlp_edge.export.pipeline import export_bundle

pytestmark = pytest.mark.slow

HIDDEN, INNER, HEADS, KV_HEADS = 256, 512, 2, 1
KINDS = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ2_XXS IQ3_S"
).split()
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")


def raw_tensor(shape: tuple[int, int], kind: GGMLQuantizationType, seed: int) -> Any:
    """Valid bytes of a tensor: random blocks whose values are finite."""
    rng = np.random.default_rng(seed)
    if kind == GGMLQuantizationType.F32:
        return rng.normal(size=shape).astype(np.float32)
    if kind == GGMLQuantizationType.F16:
        return rng.normal(size=shape).astype(np.float16)
    values, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // values, size), dtype=np.uint8)
    # An odd byte of a half-precision scale holds its exponent: 0x30 makes it small and finite.
    blocks[..., 1::2] = (blocks[..., 1::2] & 3) | 0x30
    return blocks.reshape(shape[0], -1)


def write_gguf(path: Path, family: str, kind: str, **settings: Any) -> Path:
    """A random model of one layer with a byte tokenizer."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|end|>"]
    writer = GGUFWriter(path, family)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(1)
    writer.add_head_count(settings.get("heads", HEADS))
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_value_length(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(alphabet))
    if settings.get("tokenizer", True):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(alphabet)
        writer.add_token_types([1] * 257 + [3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(257)
        writer.add_bos_token_id(257)
    if "parts" in settings:
        writer.add_uint16("split.count", settings["parts"])
    chosen = GGMLQuantizationType[kind]
    kv = HIDDEN // HEADS * KV_HEADS
    matrices = {
        "token_embd": (len(alphabet), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    for seed, (name, shape) in enumerate(matrices.items()):
        plain = chosen.value < 2
        data = raw_tensor(shape, chosen, seed)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=None if plain else chosen)
    norms = {"output_norm": HIDDEN, "blk.0.attn_norm": HIDDEN, "blk.0.ffn_norm": HIDDEN}
    if family in ("qwen3", "gemma3"):
        norms |= dict.fromkeys(("blk.0.attn_q_norm", "blk.0.attn_k_norm"), HIDDEN // HEADS)
    if family.startswith("gemma"):
        norms |= dict.fromkeys(("blk.0.post_attention_norm", "blk.0.post_ffw_norm"), HIDDEN)
    for name, size in norms.items():
        writer.add_tensor(f"{name}.weight", np.linspace(0.5, 1.5, size, dtype=np.float32))
    if family == "qwen2":
        for name, size in (("q", HIDDEN), ("k", kv), ("v", kv)):
            writer.add_tensor(f"blk.0.attn_{name}.bias", np.linspace(-1, 1, size, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_equals_transformers(path: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    out.mkdir()
    dequantise_gguf(path, out)
    found = load_file(out / "model.safetensors")
    assert set(expected) - {"lm_head.weight"} == set(found)
    for name, value in found.items():
        assert np.isfinite(value).all()
        np.testing.assert_array_equal(value, expected[name].numpy(), err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisation_gives_what_transformers_gives(tmp_path: Path, kind: str) -> None:
    check_equals_transformers(write_gguf(tmp_path / "x.gguf", "llama", kind), tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_transformers_gives(tmp_path: Path, family: str) -> None:
    check_equals_transformers(write_gguf(tmp_path / "x.gguf", family, "Q8_0"), tmp_path / "out")


def test_raw_tensors_are_finite() -> None:
    for kind in KINDS[3:]:
        chosen = GGMLQuantizationType[kind]
        assert np.isfinite(dequantize(raw_tensor((4, 256), chosen, 0), chosen)).all()


def test_a_part_of_a_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", "Q8_0", parts=3)
    with pytest.raises(BackboneError, match="one of 3 parts") as caught:
        export_bundle(str(path), {}, None, tmp_path / "out")
    assert "merge" in caught.value.remedy
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", "Q8_0", tokenizer=False)
    with pytest.raises(BackboneError, match="no tokenizer"):
        open_gguf(path)


def test_a_file_whose_weights_contradict_its_metadata(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "qwen3", "Q8_0", heads=4)
    with pytest.raises(BackboneError, match=r"q_proj\.weight is not"):
        export_bundle(str(path), {}, None, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


def test_a_file_that_is_cut(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", "Q8_0")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(BackboneError, match=r"x\.gguf cannot be read"):
        export_bundle(str(path), {}, None, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


def test_a_disk_that_fills_while_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", "Q8_0")

    def fill(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gguf.dequantize", fill)
    with pytest.raises(ResourceError, match="full"):
        export_bundle(str(path), {}, None, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


def test_a_gguf_file_becomes_a_bundle(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", "F16")
    report = export_bundle(str(path), {}, None, tmp_path / "out", "fp32", fast=True)
    assert report["perplexity"]["ratio"] == pytest.approx(1, abs=1e-4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "x.gguf"]
