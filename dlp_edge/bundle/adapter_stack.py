"""The stacked-weight file: all adapters of a bundle in one pair of tensors per linear layer.

A linear layer [h -> d] that the adapters change has `<module>.A` [sum r_n, h] and
`<module>.B` [sum r_n, d]; adapter n owns rows [offset_n, offset_n + r_n) of both (B is the
transpose of PEFT's [d, r]). With equal ranks this is the paper's [N, r, h]; mixed ranks need no
padding. The file's metadata holds offsets, ranks and scalings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from dlp_edge.bundle.manifest import Manifest
from dlp_edge.errors import BundleError
from dlp_edge.untrusted.safetensors_header import check_bytes
from dlp_edge.untrusted.strict_json import parse

Array = npt.NDArray[np.floating]
LARGEST_SCALING = 1e6  # alpha / r of real adapters is 0.1 to 100
_REEXPORT = "Export the bundle again"
_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}  # safetensors' names


@dataclass(frozen=True)
class LoraPair:
    """One adapter's low-rank pair for one linear layer: delta(x) = scaling (x A^T) B^T.

    Attributes:
        a: A [r, h].
        b: B transposed, [r, d].
        scaling: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    a: Array
    b: Array
    scaling: float


@dataclass(frozen=True)
class AdapterSpan:
    """The rows of one adapter in the stacked tensors of one linear layer."""

    offset: int
    rank: int
    scaling: float

    @property
    def slice(self) -> slice:
        return slice(self.offset, self.offset + self.rank)


@dataclass(frozen=True)
class AdapterStack:
    """The adapters of a bundle.

    Attributes:
        numbers: all tensors, flattened and concatenated.
        starts: `<module>.A` and `<module>.B` -> the tensor's first index in `numbers`.
        a: module -> A [sum r, h], a view of `numbers`.
        b: module -> B [sum r, d], a view of `numbers`.
        rows: adapter -> module -> its rows.
    """

    numbers: Array = field(default_factory=lambda: np.empty(0, np.float32))
    starts: dict[str, int] = field(default_factory=dict)
    a: dict[str, Array] = field(default_factory=dict)
    b: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, dict[str, AdapterSpan]] = field(default_factory=dict)


def pack(adapters: Mapping[str, Mapping[str, LoraPair]], dtype: str) -> AdapterStack:
    """Stacks adapters (name -> module -> pair) in the given order, converted to `dtype`."""
    sizes: dict[str, tuple[int, int]] = {}
    height: dict[str, int] = {}
    rows: dict[str, dict[str, AdapterSpan]] = {}
    for name, pairs in adapters.items():
        rows[name] = {}
        for module, pair in pairs.items():
            offset, rank = height.get(module, 0), pair.a.shape[0]
            rows[name][module] = AdapterSpan(offset, rank, pair.scaling)
            height[module] = offset + rank
            sizes[module] = (pair.a.shape[1], pair.b.shape[1])
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    end = 0
    for module, widths in sizes.items():
        for side, width in zip("AB", widths, strict=True):
            places[f"{module}.{side}"] = (end, (height[module], width))
            end += height[module] * width
    stack = _views(np.empty(end, dtype), places, rows)
    for name, pairs in adapters.items():
        for module, pair in pairs.items():
            at = rows[name][module].slice
            stack.a[module][at], stack.b[module][at] = pair.a, pair.b
    return stack


def _views(
    numbers: Array,
    places: Mapping[str, tuple[int, tuple[int, ...]]],
    rows: dict[str, dict[str, AdapterSpan]],
) -> AdapterStack:
    """Builds a stack of views; `places` maps tensor names to (first index, shape)."""
    tensors = {
        name: numbers[start : start + math.prod(shape)].reshape(shape)
        for name, (start, shape) in places.items()
    }
    return AdapterStack(
        numbers,
        {name: start for name, (start, _) in places.items()},
        {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".A")},
        {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".B")},
        rows,
    )


def fits_half(numbers: Array) -> bool:
    """Whether all numbers are finite in half precision, in which CPUs compute with adapters."""
    if numbers.dtype == np.float16:
        return bool(np.isfinite(numbers).all())
    limit = float(np.finfo(np.float16).max)
    # Not a number fails both comparisons.
    return not numbers.size or bool(numbers.max() <= limit and numbers.min() >= -limit)


def converted(stack: AdapterStack, dtype: str) -> AdapterStack:
    """Converts a stack to another float type; values beyond its range become infinite."""
    shapes = {f"{module}.A": a.shape for module, a in stack.a.items()}
    shapes.update({f"{module}.B": b.shape for module, b in stack.b.items()})
    places = {name: (start, shapes[name]) for name, start in stack.starts.items()}
    with np.errstate(over="ignore"):
        return _views(stack.numbers.astype(dtype, copy=False), places, stack.rows)


def unpack(stack: AdapterStack, name: str) -> dict[str, LoraPair]:
    """Returns one adapter of the stack (module -> pair), as views."""
    return {
        module: LoraPair(stack.a[module][at.slice], stack.b[module][at.slice], at.scaling)
        for module, at in stack.rows[name].items()
    }


def to_bytes(stack: AdapterStack) -> bytes:
    """Serializes the stack as a safetensors file."""
    tensors = {f"{module}.A": tensor for module, tensor in stack.a.items()}
    tensors.update({f"{module}.B": tensor for module, tensor in stack.b.items()})
    layout = {
        name: {module: [at.offset, at.rank, at.scaling] for module, at in modules.items()}
        for name, modules in stack.rows.items()
    }
    return save(tensors, metadata={"layout": json.dumps(layout)})


def from_bytes(data: bytes) -> AdapterStack:
    """Reads what `to_bytes` wrote.

    Raises:
        BundleError: the bytes are not such a file, or the layout does not match the tensors.
    """
    try:
        header = check_bytes(data)
        kinds = {info.dtype for info in header.tensors.values()}
        if len(kinds) > 1:
            raise ValueError("mixed tensor types")
        dtype = np.dtype(_TYPES[kinds.pop()] if kinds else np.float32)
        content = max((info.stop for info in header.tensors.values()), default=0)
        numbers = np.frombuffer(data, dtype, content // dtype.itemsize, len(data) - content)
        layout = parse(header.metadata["layout"].encode())
        rows = {
            name: {module: _parse_rows(*row) for module, row in modules.items()}
            for name, modules in layout.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BundleError(f"adapters.safetensors cannot be read ({error})", _REEXPORT) from error
    if not all(name.endswith((".A", ".B")) for name in header.tensors):
        raise BundleError("adapters.safetensors has a tensor that is neither A nor B", _REEXPORT)
    places = {n: (i.start // dtype.itemsize, i.shape) for n, i in header.tensors.items()}
    stack = _views(np.require(numbers, requirements="A"), places, rows)
    _check_rows(stack)
    return stack


def _parse_rows(offset: object, rank: object, scaling: object) -> AdapterSpan:
    if type(offset) is not int or type(rank) is not int or type(scaling) not in (int, float):
        raise ValueError(f"invalid layout entry {offset!r}, {rank!r}, {scaling!r}")
    return AdapterSpan(offset, rank, float(scaling))  # type: ignore[arg-type]


def _check_rows(stack: AdapterStack) -> None:
    if stack.a.keys() != stack.b.keys():
        raise BundleError("adapters.safetensors has unpaired A and B tensors", _REEXPORT)
    for module, a in stack.a.items():
        b = stack.b[module]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
            raise BundleError(
                f"the stacked tensors of {module} have incompatible shapes", _REEXPORT
            )
        if a.dtype != b.dtype or a.dtype.kind != "f":
            raise BundleError(
                f"the stacked tensors of {module} do not share one float type", _REEXPORT
            )
        if not (fits_half(a) and fits_half(b)):
            raise BundleError(
                f"the stacked tensors of {module} are not finite in half precision",
                _REEXPORT,
            )
    taken: dict[str, list[AdapterSpan]] = {}
    for name, modules in stack.rows.items():
        for module, at in modules.items():
            inside = module in stack.a and at.rank > 0 and at.offset >= 0
            if not inside or at.offset + at.rank > stack.a[module].shape[0]:
                raise BundleError(
                    f"the rows of adapter {name} lie outside the tensors of {module}", _REEXPORT
                )
            if not abs(at.scaling) <= LARGEST_SCALING:
                raise BundleError(f"adapter {name} scales {module} by {at.scaling}", _REEXPORT)
            taken.setdefault(module, []).append(at)
    for module, spans in taken.items():
        spans.sort(key=lambda at: at.offset)
        if any(a.offset + a.rank > b.offset for a, b in pairwise(spans)):
            raise BundleError(f"two adapters share rows of {module}", _REEXPORT)
    for module, a in stack.a.items():
        if sum(at.rank for at in taken.get(module, ())) != a.shape[0]:
            raise BundleError(f"rows of {module} belong to no adapter", _REEXPORT)


def check(stack: AdapterStack, manifest: Manifest) -> None:
    """Raises ValueError unless a stack has the manifest's adapters, ranks, slot sizes and dtype.

    The message continues a sentence that starts with the file's name.
    """
    if list(stack.rows) != [adapter.name for adapter in manifest.adapters]:
        raise ValueError("does not hold the adapters listed in the manifest")
    for adapter in manifest.adapters:
        rows = stack.rows[adapter.name].values()
        if max((at.rank for at in rows), default=0) != adapter.rank:
            raise ValueError(f"has a rank for {adapter.name} that differs from the manifest")
    widths = {
        part.module: (slot.input_size, part.stop - part.start)
        for slot in manifest.backbone.slots
        for part in slot.parts
    }
    for module, a in stack.a.items():
        if (a.shape[1], stack.b[module].shape[1]) != widths.get(module):
            raise ValueError(f"does not match the backbone at {module[:200]}")
        if a.dtype != manifest.backbone.dtype:
            raise ValueError(f"has type {a.dtype}, not {manifest.backbone.dtype}")
