"""What an export will take, from the headers of its sources alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from dlp_edge.errors import BackboneError, ResourceError, UsageError
from dlp_edge.export.backbone import check_format
from dlp_edge.export.gguf_file import open_gguf
from dlp_edge.export.mapped_model import MappedWeights
from dlp_edge.export.report import PERPLEXITY_TOKENS
from dlp_edge.export.source import read_json
from dlp_edge.models.architectures import check_supported
from dlp_edge.runtime.memory import available

# Bytes per weight in a bundle, scales and zero points included. int4 assumes that a sixth of the
# matrices stays in int8, as in a Q4_K_M file.
_BODY = {"int4": 0.73, "int8": 1.125, "nf4": 0.5625, "fp16": 2.0, "fp32": 4.0}
_HEAD = {"int4": 0.72, "int8": 1.125, "nf4": 1.125, "fp16": 2.0, "fp32": 4.0}
_EMBEDDING = 1.125
_GRID_TYPES = {"Q4_0", "Q4_1", "Q4_K"}
# Fitted to measured exports (docs/decisions/export.md).
LIBRARIES = 0.7e9  # bytes of torch, transformers and onnxruntime
COPIES = 3.2  # of the largest matrix in fp32 that exist at once
CPU_SECONDS = 220.0  # per billion parameters, on top of BASE_SECONDS
BASE_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """An export, estimated.

    Attributes:
        architecture: as transformers or the GGUF file names it.
        parameters: number of weights.
        source_types: tensors by the type that they are stored in.
        quantisation: the format; for `auto` the likely one.
        bundle_bytes: of the finished bundle, without adapters and router.
        work_bytes: of the disk space that is needed meanwhile, the bundle included.
        memory_bytes: of the largest resident set.
        cpu_minutes: of one core.
    """

    architecture: str
    parameters: int
    source_types: dict[str, int]
    quantisation: str
    bundle_bytes: int
    work_bytes: int
    memory_bytes: int
    cpu_minutes: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check_memory(self) -> None:
        """Raise ResourceError if less memory is free than the export takes."""
        free = available()
        if self.memory_bytes > free:
            raise ResourceError(
                f"the export takes about {self.memory_bytes / 1e9:.1f} GB of memory, "
                f"{free / 1e9:.1f} GB are free",
                "Close other programs, or export on a machine with more memory",
            )


def plan_export(backbone: str, quantisation: str | None = None, target: str = "cpu") -> Plan:
    """Estimate the export of a folder or GGUF file.

    Raises:
        UsageError: the backbone is a hub id, whose files are not here.
        BackboneError: it cannot be read, or is not supported.
    """
    check_format(quantisation, target)
    path = Path(backbone)
    if path.is_dir():
        architecture, tensors = _folder_tensors(path)
    elif path.is_file() and path.suffix == ".gguf":
        reader = open_gguf(path)
        architecture = str(reader.get_field("general.architecture").contents())
        tensors = [(t.tensor_type.name, tuple(map(int, t.shape))) for t in reader.tensors]
    elif path.exists():
        raise BackboneError(f"{backbone} is no folder or GGUF file", "Check the path")
    else:
        raise UsageError(
            f"{backbone} is not here", "Download it first: --dry-run reads files, not the hub"
        )
    types = Counter(kind for kind, shape in tensors if len(shape) == 2)
    parameters = sum(prod(shape) for _, shape in tensors)
    largest = max(prod(shape) for _, shape in tensors)
    embeddings = sum(prod(shape) == largest for _, shape in tensors)
    on_grid = sum(types[kind] for kind in _GRID_TYPES) * 2 > types.total()
    chosen = quantisation or ("int4" if on_grid else "int8")
    shared = chosen == "int8" and embeddings == 1
    bundle = _BODY[chosen] * (parameters - embeddings * largest) + _HEAD[chosen] * largest
    bundle += 0 if shared else _EMBEDDING * largest
    logits = 2 * 4 * PERPLEXITY_TOKENS * max(max(shape) for _, shape in tensors)
    dense = parameters * (2 if target == "cuda" else 4)
    return Plan(
        architecture=architecture,
        parameters=parameters,
        source_types=dict(types),
        quantisation=chosen,
        bundle_bytes=int(bundle),
        work_bytes=int(dense + bundle + (0 if path.is_dir() else 4 * parameters)),
        memory_bytes=int(LIBRARIES + max(COPIES * 4 * largest, logits + 4 * largest, 2 * bundle)),
        cpu_minutes=(BASE_SECONDS + CPU_SECONDS * parameters / 1e9) / 60,
    )


def _folder_tensors(folder: Path) -> tuple[str, list[tuple[str, tuple[int, ...]]]]:
    config = read_json(folder, "config.json")
    check_supported(config)
    tensors = MappedWeights(folder).tensors
    if not tensors:
        raise BackboneError(
            f"{folder} has no *.safetensors weights", "Save the model with safe serialization"
        )
    found = [
        (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for value in tensors.values()
    ]
    return str(config["architectures"][0]), found
