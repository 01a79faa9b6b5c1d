"""The backbone as an ONNX graph: built and quantised by onnxruntime-genai's model builder, then
given adapter slots."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx

from dlp_edge.bundle import BACKBONE
from dlp_edge.errors import BackboneError
from dlp_edge.export.quiet import quiet
from dlp_edge.export.slots import prepare_graph
from dlp_edge.export.source import Source
from dlp_edge.manifest import BackboneEntry

# The builder's precision and options for each of our formats. int8: symmetric, blocks of 32, the
# activations quantised to int8 as well (accuracy_level 4, the builder's default on a CPU). int4:
# k-quant with sensitive layers in int8, because the builder's default int4 loses far more
# (docs/decisions.md).
FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    "int8": ("int8", {}),
    "int4": ("int4", {"algo_config": "k_quant_mixed"}),
    "fp32": ("fp32", {}),
}


def export_backbone(
    source: Source, modules: Iterable[str], quantisation: str, out: Path
) -> BackboneEntry:
    """Writes `backbone.onnx` and `backbone.onnx.data` into `out`.

    Args:
        modules: linear layers that need a slot.
        quantisation: a key of `FORMATS`.

    Raises:
        BackboneError: the builder fails, or its graph is not as expected.
    """
    build_graph(source.folder, quantisation, out)
    for path in out.iterdir():  # the builder also writes files for onnxruntime-genai
        if path.is_file() and not path.name.startswith(BACKBONE):
            path.unlink()
    model = onnx.load(out / BACKBONE, load_external_data=False)
    windows = attention_windows(source.folder)
    slots = prepare_graph(model, modules, source.linear_sizes(), windows)
    onnx.save(model, out / BACKBONE)
    config = source.config
    heads = config["num_attention_heads"]
    return BackboneEntry(
        name=source.name,
        fingerprint=source.fingerprint,
        architecture=source.architecture,
        quantisation=quantisation,
        dtype="float32",
        context_length=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        bos_token=source.bos_token,
        eos_token=source.eos_token,
        eos_token_ids=source.eos_token_ids,
        slots=slots,
    )


def attention_windows(folder: Path) -> list[int]:
    """For each decoder layer how many tokens it attends to, the present one included; -1 for
    all. As transformers understands the configuration."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    window = getattr(config, "sliding_window", None)
    # Only a configuration that mixes both kinds lists them.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if window and kind == "sliding_attention" else -1 for kind in kinds]


def build_graph(
    folder: Path, quantisation: str, out: Path, extra: Mapping[str, str] | None = None
) -> None:
    """Writes the builder's own graph, and what onnxruntime-genai needs beside it, into `out`.

    Raises:
        BackboneError: the builder fails.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    precision, options = FORMATS[quantisation]
    settings = {"filename": BACKBONE, **options, **(extra or {})}
    with (
        tempfile.TemporaryDirectory(prefix=".builder-", dir=out) as cache,
        quiet(),
    ):
        call = ("", str(folder), str(out), precision, "cpu", cache)
        words = [f"{key}={value}" for key, value in settings.items()]
        try:
            create_model(*call, **parse_extra_options(*call, words))
        except Exception as error:  # the builder raises whatever it stumbles over
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not the backbone
            raise BackboneError(
                f"the model builder failed ({type(error).__name__}: {error})",
                "Check that the backbone's files are whole, and that onnxruntime-genai supports it",
            ) from error
