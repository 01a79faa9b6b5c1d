"""Makes the demo's bundle without torch: from the backbone's GGUF file, the demo's adapters, and a
kit with everything else (`recipes/demo_kit.py` writes it).

The manifest of the kit has the hashes of what is computed here, so a machine that computes
something else says so.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlp_edge.atomic.staging import check_space, staged
from dlp_edge.bundle import adapter_stack, files
from dlp_edge.bundle.bundle import open_bundle, parse_manifest
from dlp_edge.bundle.graph_allowlist import check_backbone
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.bundle.peft_reader import read_adapters
from dlp_edge.demo.gguf import GgufFile
from dlp_edge.errors import BackboneError
from dlp_edge.export.quantisation.grid_detection import find_grid
from dlp_edge.export.quantisation.quantized_matrix import BLOCK, round_int8
from dlp_edge.untrusted.strict_json import parse

KIT = Path(__file__).parent / "kit.zip"
COMPUTED = (files.BACKBONE_DATA, files.ADAPTERS)

Array = npt.NDArray[np.generic]
Progress = Callable[[str, float], None]

# A matrix of the graph -> the matrices of the file whose rows it holds.
_SOURCES = {
    "attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "attn.o_proj": ("attn_output",),
    "mlp.gate_proj": ("ffn_gate",),
    "mlp.up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_MATRIX = re.compile(r"model\.layers\.(\d+)\.(\w+\.\w+)\.MatMul\.weight_(\w+)")
_NORM = re.compile(rf"model\.layers\.(\d+)\.({'|'.join(_NORMS)})\.weight")


def assemble(gguf: Path, adapters: Path, out: Path, tell: Progress) -> None:
    """Writes the demo's bundle, in seconds.

    Args:
        gguf: the demo's backbone, whose hash has been checked.
        adapters: the folder of the demo's PEFT adapters.
        tell: called with (step, fraction).

    Raises:
        BundleError: something was computed differently on this machine.
        ResourceError: the disk is full.
    """
    with zipfile.ZipFile(KIT) as archive:
        kit = {name: archive.read(name) for name in archive.namelist()}
    with staged(out, _is_bundle) as staging:
        write_bundle(kit, gguf, adapters, staging, tell)
        bundle = open_bundle(staging)
        for name in COMPUTED:
            bundle.verify(name)


def write_bundle(
    kit: Mapping[str, bytes], gguf: Path, adapters: Path, folder: Path, tell: Progress
) -> None:
    """Writes the files of a kit, and those that are computed; see `assemble`."""
    for name, data in kit.items():
        (folder / name).write_bytes(data)
    manifest = parse_manifest(parse(kit[files.MANIFEST]))
    size = manifest.files[files.BACKBONE_DATA].size
    check_space(folder, 2 * size)
    tell("packing the adapters", 0.3)
    (folder / files.ADAPTERS).write_bytes(_packed(adapters, manifest))
    rank = sum(adapter.rank for adapter in manifest.adapters)
    model = kit[files.BACKBONE]
    graph = check_backbone(model, manifest.backbone, files.BACKBONE_DATA, size, rank)
    source = _Weights(GgufFile(gguf), manifest)
    with (folder / files.BACKBONE_DATA).open("wb") as file:
        file.truncate(size)
        outside = {name: tensor for name, tensor in graph.tensors.items() if tensor.raw is None}
        places = sorted((tensor.offset, name) for name, tensor in outside.items())
        for number, (offset, name) in enumerate(places):
            tell("converting the weights", 0.4 + 0.5 * number / len(places))
            file.seek(offset)
            file.write(np.ascontiguousarray(source.tensor(name)).data)


def _is_bundle(folder: Path) -> bool:
    return (folder / files.MANIFEST).is_file()


def _packed(folder: Path, manifest: Manifest) -> bytes:
    """The stacked file of the adapters."""
    sizes = {
        part.module: (slot.input_size, part.stop - part.start)
        for slot in manifest.backbone.slots
        for part in slot.parts
    }
    names = [entry.name for entry in manifest.adapters]
    read = read_adapters({name: folder / name for name in names}, sizes)
    pairs = {adapter.name: adapter.pairs for adapter in read}
    return adapter_stack.to_bytes(adapter_stack.pack(pairs, manifest.backbone.dtype))


class _Weights:
    """The tensors of the bundle's graph, as `export.quantisation` makes them of the same file."""

    def __init__(self, source: GgufFile, manifest: Manifest) -> None:
        self._source = source
        self._heads = int(source.metadata["llama.attention.head_count"])
        self._kv_heads = int(source.metadata["llama.attention.head_count_kv"])
        self._base = float(source.metadata["llama.rope.freq_base"])
        self._manifest = manifest
        self._name = ""  # of the matrix that was quantised last: its tensors follow each other
        self._quantised: Mapping[str, Array] = {}

    def tensor(self, name: str) -> Array:
        """A tensor of the graph."""
        matrix, norm = _MATRIX.fullmatch(name), _NORM.fullmatch(name)
        if matrix is not None:
            layer, part, kind = matrix.groups()
            return self._matrix(layer, part)[kind]
        if norm is not None:
            return self._source.read(f"blk.{norm[1]}.{_NORMS[norm[2]]}.weight")
        if name.startswith("block_means_"):
            return _block_means(int(name.rpartition("_")[2]))
        if name.startswith("lm_head"):
            return self._head()[name.rpartition("_")[2]]
        if name.endswith("_cache"):
            return self._rotations()[name]
        return self._source.read("output_norm.weight")

    def _matrix(self, layer: str, part: str) -> Mapping[str, Array]:
        """A matrix on its own grid of 16 levels, with the remainder as further columns."""
        if self._name != f"{layer}.{part}":
            self._name = f"{layer}.{part}"
            rows = np.concatenate([self._rows(layer, source) for source in _SOURCES[part]])
            grid = find_grid(rows, np.float32)
            if grid is None:
                raise BackboneError(f"{part} of layer {layer} is on no grid", "Download it again")
            self._quantised = grid.with_block_means(np.float32).stored()
        return self._quantised

    def _rows(self, layer: str, source: str) -> npt.NDArray[np.float32]:
        """A matrix of the file. Queries and keys are rotated in pairs of neighbours there, and in
        halves here."""
        rows = self._source.read(f"blk.{layer}.{source}.weight")
        heads = {"attn_q": self._heads, "attn_k": self._kv_heads}.get(source)
        if heads is None:
            return rows
        paired = rows.reshape(heads, -1, 2, rows.shape[1])
        halves: npt.NDArray[np.float32] = paired.swapaxes(1, 2).reshape(rows.shape)
        return halves

    def _head(self) -> Mapping[str, Array]:
        if self._name != "lm_head":
            self._name = "lm_head"
            embedding = self._source.read("token_embd.weight")
            self._quantised = round_int8(embedding, np.float32).stored()
        return self._quantised

    def _rotations(self) -> dict[str, Array]:
        """Of every position. In double precision, so that all machines round to the same."""
        backbone = self._manifest.backbone
        powers = self._base ** (np.arange(0, backbone.head_size, 2) / backbone.head_size)
        frequencies = 1 / powers.astype(np.float32)
        angles = np.outer(np.arange(backbone.context_length, dtype=np.float32), frequencies)
        wide = angles.astype(np.float64)
        return {
            "cos_cache": np.cos(wide).astype(np.float32),
            "sin_cache": np.sin(wide).astype(np.float32),
        }


def _block_means(width: int) -> Array:
    """The constant whose product with an input is the means of its blocks."""
    blocks = width // BLOCK
    means = np.zeros((width, -(-blocks // BLOCK) * BLOCK), np.float32)
    means[np.arange(width), np.arange(width) // BLOCK] = 1 / BLOCK
    return means
