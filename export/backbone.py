"""Exports the backbone: a dense ONNX graph from onnxruntime-genai's model builder, with adapter
slots, then quantised."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from tokenizers import Tokenizer

from dlp_edge.atomic.sharing import move
from dlp_edge.bundle.files import BACKBONE, BACKBONE_DATA
from dlp_edge.bundle.manifest import BackboneEntry, Slot
from dlp_edge.errors import BackboneError, UsageError
from dlp_edge.export.mapped_model import mapped_model
from dlp_edge.export.quantisation.int4 import Int4, find_on_grid
from dlp_edge.export.quantisation.nf4 import BLOCK as NF4_BLOCK
from dlp_edge.export.quantisation.nf4 import round_nf4
from dlp_edge.export.quantisation.quantise import HEAD, Chooser, Quantised, Quantiser, store_half
from dlp_edge.export.quantisation.quantized_matrix import round_int8
from dlp_edge.export.report import APART
from dlp_edge.export.slots import prepare_graph
from dlp_edge.export.source import Source
from dlp_edge.export.suppress_output import suppress_output
from dlp_edge.export.weights import WeightFile
from dlp_edge.models.architectures import FUSED_MLP

# The weight formats of each target, and the compute type of a graph.
FORMATS = {
    "cpu": ("int8", "int4", "nf4", "fp16", "fp32"),
    "cuda": ("int8", "int4", "nf4", "fp16"),
    "webgpu": ("int8", "int4", "fp32"),
}
DTYPES: dict[str, Literal["float32", "float16"]] = {"cpu": "float32", "cuda": "float16"}
_PRECISIONS = {"cpu": "fp32", "cuda": "fp16"}

OnProgress = Callable[[float], None]


def check_target_names(target: str) -> str:
    """One or several targets, joined by commas, in the order of a manifest.

    Raises:
        UsageError: one is unknown.
    """
    names = target.split(",")
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"unknown target {name!r}", f"Use {', '.join(FORMATS)}, or several")
    return ",".join(name for name in FORMATS if name in names)


def check_format(quantisation: str | None, target: str) -> None:
    """Raise UsageError if a target does not support the format; None is the default."""
    names = check_target_names(target).split(",")
    common = [name for name in FORMATS["cpu"] if all(name in FORMATS[one] for one in names)]
    if quantisation is not None and quantisation not in common:
        known = quantisation in FORMATS["cpu"]
        raise UsageError(
            f"{quantisation} does not go with --target {target}"
            if known
            else f"unknown quantisation {quantisation!r}",
            f"Use {', '.join(common)}",
        )


def graph_target(target: str) -> str:
    """The target that the model builder writes the graph for: "cuda" in half precision, "cpu" in
    single precision, which WebGPU runs as it is and CUDA after a conversion at load time."""
    return "cuda" if target == "cuda" else "cpu"


def needs_half(target: str) -> bool:
    """Whether CUDA is one of several targets."""
    return "cuda" in target and target != "cuda"


def check_half(architecture: str, target: str) -> None:
    """Raise UsageError for an architecture that needs single precision in places."""
    if needs_half(target) and architecture.startswith("Gemma"):
        raise UsageError(
            f"{architecture} overflows in half precision unless its norms stay in single", APART
        )


class DenseBackbone:
    """The backbone's dense graph with adapter slots: fp32 for the CPU, fp16 for CUDA.

    Stored in `folder`, which may be removed once all formats are written.
    """

    def __init__(
        self,
        source: Source,
        modules: Iterable[str],
        target: str,
        folder: Path,
        calibration: str | None = None,
    ) -> None:
        """Build the graph, unless an interrupted export left it in the folder.

        Args:
            modules: full names of the linear layers that need a slot.
            calibration: text for the int4 search instead of the package's own.

        Raises:
            BackboneError: the builder fails, or its graph is not as expected.
        """
        built = folder / "built.onnx"  # the graph before the rewrite
        if not built.exists():
            folder.mkdir(exist_ok=True)
            # The builder can put norms of queries and keys into attention for CUDA, where neither
            # the comparison with PEFT on the CPU nor the fallback could follow.
            extra = {"fuse_qk_norm_gqa": "false"}
            # Fewer kernels, and one slot for both; a CPU gains nothing from it.
            if target == "cuda" or source.architecture in FUSED_MLP:
                extra["fuse_mlp_gate_up"] = "true"
            build_graph(source.folder, _PRECISIONS[target], target, folder, extra)
            move(folder / BACKBONE, built)
        self.source = source
        self.calibration = calibration
        self.target = target
        self.path = folder / BACKBONE
        model = onnx.load(built, load_external_data=False)
        self.slots: tuple[Slot, ...] = prepare_graph(
            model,
            modules,
            source.linear_sizes(),
            attention_windows(source.folder),
            rotary_layers(source.folder),
        )
        onnx.save(model, self.path)

    def default_format(self) -> str:
        """The fastest format within 1.02 times the source's perplexity: int4 if its weights already
        lie on a 4-bit grid, else int8 (docs/quantisation.md)."""
        return "int4" if self.on_grid else "int8"

    @cached_property
    def on_grid(self) -> set[str]:
        """Names of the MatMul nodes whose weights lie on a 4-bit grid already."""
        graph = onnx.load(self.path, load_external_data=False).graph
        data = self.path.with_name(BACKBONE_DATA)
        return find_on_grid(graph, WeightFile(graph, data, data), DTYPES[self.target])

    def write(self, quantisation: str, out: Path, on_progress: OnProgress) -> BackboneEntry:
        """Write `backbone.onnx` and `backbone.onnx.data` in a format into `out`.

        Args:
            on_progress: called with the fraction done.
        """
        entry = self.entry(quantisation)
        if quantisation == entry.dtype.replace("float", "fp"):
            shutil.copyfile(self.path, out / BACKBONE)
            shutil.copyfile(self.path.with_name(BACKBONE_DATA), out / BACKBONE_DATA)
        elif quantisation == "fp16":
            self.rewrite(out, store_half)
        else:
            self.quantise(
                out,
                lambda quantiser: self._chooser(quantisation, quantiser, on_progress),
                on_progress,
            )
        return entry

    def quantise(
        self, out: Path, chooser: Callable[[Quantiser], Chooser], on_progress: OnProgress
    ) -> None:
        """Write the graph, with each matrix in the format that the chooser picks."""

        def change(graph: onnx.GraphProto, weights: WeightFile) -> None:
            quantiser = Quantiser(graph, weights, self.target)
            quantiser.run(chooser(quantiser), lambda done: on_progress(0.7 + 0.3 * done))

        self.rewrite(out, change)

    def rewrite(self, out: Path, change: Callable[[onnx.GraphProto, WeightFile], None]) -> None:
        """Write the graph after `change` has edited it and its weights."""
        model = onnx.load(self.path, load_external_data=False)
        dense = self.path.with_name(BACKBONE_DATA)
        with WeightFile(model.graph, dense, out / BACKBONE_DATA) as weights:
            change(model.graph, weights)
        onnx.save(model, out / BACKBONE)

    def searcher(self, quantiser: Quantiser, on_grid: Collection[str]) -> Int4:
        """The int4 search for this graph.

        Args:
            on_grid: names of the MatMul nodes that keep their own levels.
        """
        tokenizer = Tokenizer.from_file(str(self.source.folder / "tokenizer.json"))
        return Int4(quantiser, self.path, self.entry("int4"), tokenizer, on_grid, self.calibration)

    def _chooser(self, quantisation: str, quantiser: Quantiser, on_progress: OnProgress) -> Chooser:
        if quantisation == "int8":
            return lambda node, matrix: round_int8(matrix, quantiser.dtype)
        if quantisation == "nf4":
            return lambda node, matrix: choose_nf4(node, matrix, quantiser.dtype)
        search = self.searcher(quantiser, self.on_grid)
        search.run(lambda done: on_progress(0.7 * done))
        return search.choose

    def entry(self, quantisation: str) -> BackboneEntry:
        """The manifest entry of the backbone in a format."""
        source, config = self.source, self.source.config
        heads = config["num_attention_heads"]
        return BackboneEntry(
            name=source.name,
            fingerprint=source.fingerprint,
            architecture=source.architecture,
            quantisation=quantisation,
            dtype=DTYPES[self.target],
            context_length=config["max_position_embeddings"],
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            bos_token=source.bos_token,
            eos_token=source.eos_token,
            eos_token_ids=source.eos_token_ids,
            slots=self.slots,
        )


def choose_nf4(
    node: onnx.NodeProto, matrix: npt.NDArray[np.floating], dtype: npt.DTypeLike
) -> Quantised:
    """NF4, or int8 for the head and for rows that are no multiple of a block: bitsandbytes' blocks
    continue into the next row, onnxruntime's do not."""
    whole = node.name != HEAD and matrix.shape[1] % NF4_BLOCK == 0
    return round_nf4(matrix) if whole else round_int8(matrix, dtype)


def attention_windows(folder: Path) -> list[int]:
    """The attention window of each decoder layer in tokens, the current one included; -1 for all.

    transformers interprets the configuration.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    window = getattr(config, "sliding_window", None)
    # Only configurations that mix both kinds list them.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if window and kind == "sliding_attention" else -1 for kind in kinds]


def rotary_layers(folder: Path) -> list[bool] | None:
    """Whether each decoder layer has a rotary embedding; None if all have."""
    from transformers import AutoConfig

    flags = getattr(AutoConfig.from_pretrained(folder), "no_rope_layers", None)
    return None if flags is None else [bool(flag) for flag in flags]


def build_graph(
    folder: Path,
    precision: str,
    target: str,
    out: Path,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write the model builder's graph, and the files that onnxruntime-genai needs, into `out`.

    Args:
        precision: "fp32", "fp16", or the builder's own "int8" and "int4".
        target: "cpu" or "cuda".
        extra: the builder's options.

    Raises:
        BackboneError: the builder fails.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    settings = {"filename": BACKBONE, **(extra or {})}
    model, weights = mapped_model(folder)
    with (
        tempfile.TemporaryDirectory(prefix=".builder-", dir=out) as cache,
        _loading(builder_config(folder), model),
        weights.releasing(),
        suppress_output(),
    ):
        call = ("", str(folder), str(out), precision, target, cache)
        words = [f"{key}={value}" for key, value in settings.items()]
        try:
            create_model(*call, **parse_extra_options(*call, words))
        except Exception as error:  # the builder raises many types
            if isinstance(error, OSError) and error.errno is not None:
                raise  # a disk error, not a fault of the backbone
            raise BackboneError(
                f"the model builder failed ({type(error).__name__}: {error})",
                "Check that its files are complete, and that onnxruntime-genai supports it",
            ) from error


def builder_config(folder: Path) -> Any:
    """The configuration as the builder expects it.

    Gemma 3's rotary embedding of its local layers is apart from that of the others, as in
    transformers 4. Every layer has a rotary embedding: `prepare_graph` removes the surplus ones,
    which the builder would do with positions as an input.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    kinds = getattr(config, "rope_parameters", None) or {}
    if "sliding_attention" in kinds and "full_attention" in kinds:
        config.rope_local_base_freq = kinds["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(kinds["full_attention"])
    if getattr(config, "no_rope_layers", None):
        config.no_rope_layers = [1] * config.num_hidden_layers
    return config


@contextmanager
def _loading(config: Any, model: Any) -> Iterator[None]:
    """Hand the builder a configuration and a model: it would load the model whole into memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {AutoConfig: config, AutoModelForCausalLM: model}
    originals = {kind: kind.__dict__.get("from_pretrained") for kind in given}
    for kind, value in given.items():
        kind.from_pretrained = lambda *_, value=value, **__: value
    try:
        yield
    finally:
        for kind, original in originals.items():
            if original is None:
                del kind.from_pretrained  # inherited
            else:
                kind.from_pretrained = original
