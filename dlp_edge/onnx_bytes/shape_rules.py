"""The shapes that a graph's operators give, and how many multiplications their time is worth.

Each operator has a rule from the shapes of its inputs to those of its outputs, exact or an upper
bound. Small integer tensors, from which shapes are made, are followed by value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dlp_edge.onnx_bytes.reader import INT32, INT64, ITEM_SIZES, Node, Tensor

Shape = tuple[int, ...]

_FOLLOWED, _LARGEST_VALUE = 64, 1 << 40  # elements of an integer tensor that is followed by value
_MATRIX_COST, _MAX_MATRICES = 1_000, 1 << 16  # of a batch, each with 100 bytes beside its own
_TO_THE_END = 1 << 31  # from here, the end of a slice is that of the dimension


class Array(NamedTuple):
    """A value's shape, its elements if they are few known integers, and whether the shape is exact
    or an upper bound."""

    shape: Shape
    values: tuple[int, ...] | None = None
    exact: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)


_Inputs = list[Array | None]
_Rule = Callable[[Node, _Inputs], tuple[list[Array], int]]


def outputs_of(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    rule = _RULES.get(node.kind)
    if rule is None:
        raise ValueError(f"no size is known for {node.kind!r}")
    try:
        outputs, products = rule(node, inputs)
    except (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{node.kind} has unexpected inputs or attributes") from error
    if any(array is not None and not array.exact for array in inputs):
        outputs = [Array(array.shape, array.values, False) for array in outputs]
    return outputs, products


def constant_of(tensor: Tensor) -> Array:
    if tensor.raw is None or tensor.dtype not in (INT32, INT64) or len(tensor.shape) > 1:
        return Array(tensor.shape)
    kind = np.dtype("<i4" if tensor.dtype == INT32 else "<i8")
    if math.prod(tensor.shape) > _FOLLOWED:
        return Array(tensor.shape)
    return Array(tensor.shape, tuple(np.frombuffer(tensor.raw, kind).tolist()))


def _values(array: Array | None) -> tuple[int, ...]:
    """The elements of a tensor that shapes depend on."""
    if array is None or array.values is None:
        raise ValueError("a shape depends on values that are not known")
    return array.values


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(map(max, *padded)) if len(padded) > 1 else padded[0]


def _elementwise(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    """Operators on elements at the same place, after broadcasting."""
    arrays = [array for array in inputs if array is not None]
    shape = _broadcast([array.shape for array in arrays])
    return [Array(shape, _combined(node, arrays, shape))], math.prod(shape)


_FUNCTIONS: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b, "Equal": lambda a, b: a == b, "Mul": lambda a, b: a * b,
}  # fmt: skip


def _combined(node: Node, arrays: list[Array], shape: Shape) -> tuple[int, ...] | None:
    """The elements of a sum, product, comparison or choice of shapes."""
    count = math.prod(shape)
    if len(shape) > 1 or count > _FOLLOWED or any(array.values is None for array in arrays):
        return None
    columns = [v * count if len(v) == 1 else v for v in (array.values or () for array in arrays)]
    if node.kind == "Where":
        return tuple(yes if chosen else no for chosen, yes, no in zip(*columns, strict=True))
    if node.kind not in _FUNCTIONS or len(columns) != 2:
        return None
    values = tuple(map(_FUNCTIONS[node.kind], *columns))
    return values if max(map(abs, values), default=0) < _LARGEST_VALUE else None


def _same(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    """Operators whose outputs have the shape of the first input."""
    array, target = _first(inputs), node.number("to", INT64)
    if target not in ITEM_SIZES:
        raise ValueError(f"{node.kind} makes an unsupported type")
    # A smaller or inexact type might change the numbers.
    kept = array.values if node.kind in ("Cast", "Identity") and target == INT64 else None
    return [Array(array.shape, kept)] + [Array(array.shape)] * 3, 8 * array.size


def _first(inputs: _Inputs) -> Array:
    if inputs[0] is None:
        raise ValueError("an operator lacks its input")
    return inputs[0]


def _concat(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    arrays = [array for array in inputs if array is not None]
    axis = _axis(node.number("axis"), len(arrays[0].shape))
    shape = list(arrays[0].shape)
    for array in arrays[1:]:
        if len(array.shape) != len(shape):
            raise ValueError("Concat joins tensors of different ranks")
        for index, size in enumerate(array.shape):
            shape[index] = shape[index] + size if index == axis else max(shape[index], size)
    known = [array.values for array in arrays]
    values: tuple[int, ...] | None = None
    if len(shape) == 1 and shape[0] <= _FOLLOWED and None not in known:
        values = tuple(value for part in known for value in part or ())
    return [Array(tuple(shape), values)], math.prod(shape)


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"the axis {axis} is outside a tensor of rank {rank}")
    return axis % rank if rank else 0


def _gather(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    data, indices = _first(inputs), _first(inputs[1:])
    axis = _axis(node.number("axis"), len(data.shape))
    shape = data.shape[:axis] + indices.shape + data.shape[axis + 1 :]
    values = None
    if data.values is not None and indices.values is not None:
        values = tuple(data.values[index] for index in indices.values)
    return [Array(shape, values)], math.prod(shape)


def _gather_quantised(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    """Rows of packed bytes, or of elements: at most 8 // bits of them a byte."""
    outputs, count = _gather(node._replace(integers={}), inputs)
    packed = max(1, 8 // node.number("bits", 4))
    shape = outputs[0].shape
    return [Array((*shape[:-1], shape[-1] * packed))], count * packed


def _slice(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    """At most the input: the bounds may depend on the inputs."""
    array = _first(inputs)
    shape, exact = list(array.shape), False
    bounds = [None if part is None else part.values for part in inputs[1:]]
    if len(bounds) >= 3 and all(b is not None for b in bounds[:3]):
        starts, ends, axes = (b or () for b in bounds[:3])
        exact = array.exact and (len(bounds) == 3 or set(bounds[3] or ()) == {1})
        for start, end, axis in zip(starts, ends, axes, strict=True):
            at = _axis(axis, len(shape))
            if exact:
                shape[at] = len(range(*slice(start, end).indices(shape[at])))
            elif 0 <= start <= end < _TO_THE_END:
                shape[at] = min(shape[at], end - start)
    return [Array(tuple(shape), None, exact)], math.prod(shape)


def _pad(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    array, pads = _first(inputs), _values(inputs[1])
    rank = len(array.shape)
    if len(pads) != 2 * rank:
        raise ValueError("Pad needs two numbers for each dimension")
    sizes = zip(array.shape, pads[:rank], pads[rank:], strict=True)
    shape = tuple(size + max(0, before) + max(0, after) for size, before, after in sizes)
    return [Array(shape)], math.prod(shape)


def _axes(node: Node, inputs: _Inputs) -> tuple[int, ...] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        return _values(inputs[1])
    return node.numbers("axes")


def _unsqueeze(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    array, axes = _first(inputs), _axes(node, inputs)
    rank = len(array.shape) + len(axes or ())
    inserted = {_axis(axis, rank) for axis in axes or ()}
    rest = iter(array.shape)
    shape = tuple(1 if index in inserted else next(rest) for index in range(rank))
    return [Array(shape, array.values if rank <= 1 else None)], 0


def _squeeze(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    array, axes = _first(inputs), _axes(node, inputs)
    if axes is None:
        raise ValueError("Squeeze has no axes")
    removed = {_axis(axis, len(array.shape)) for axis in axes}
    shape = tuple(size for index, size in enumerate(array.shape) if index not in removed)
    return [Array(shape, array.values)], 0


def _reduce(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    array, axes = _first(inputs), _axes(node, inputs)
    rank = len(array.shape)
    reduced = set(range(rank)) if axes is None else {_axis(axis, rank) for axis in axes}
    if node.number("keepdims", 1):
        shape = tuple(1 if i in reduced else size for i, size in enumerate(array.shape))
    else:
        shape = tuple(size for i, size in enumerate(array.shape) if i not in reduced)
    return [Array(shape)], array.size


def _transpose(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    array = _first(inputs)
    order = node.numbers("perm") or tuple(reversed(range(len(array.shape))))
    if sorted(order) != list(range(len(array.shape))):
        raise ValueError("Transpose has no permutation")
    return [Array(tuple(array.shape[index] for index in order))], array.size


def _flatten(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    array = _first(inputs)
    axis = node.number("axis", 1)
    return [Array((math.prod(array.shape[:axis]), math.prod(array.shape[axis:])))], 0


def _split(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    """Each part at most the whole, unless their sizes are given."""
    array = _first(inputs)
    sizes = node.numbers("split")
    if sizes is None and len(inputs) > 1 and inputs[1] is not None:
        sizes = inputs[1].values
    axis = _axis(node.number("axis"), len(array.shape))
    outputs = []
    for index, _ in enumerate(node.outputs):
        size = array.shape[axis] if sizes is None else min(array.shape[axis], max(0, sizes[index]))
        outputs.append(Array((*array.shape[:axis], size, *array.shape[axis + 1 :])))
    return outputs, array.size


def _reshape(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    array, target = _first(inputs), _values(inputs[1])
    if node.number("allowzero"):
        raise ValueError("Reshape with allowzero is not supported")
    sizes = [array.shape[i] if size == 0 else size for i, size in enumerate(target)]
    known = math.prod(size for size in sizes if size != -1)
    if any(size < -1 for size in sizes) or sizes.count(-1) > 1 or known < 1:
        raise ValueError("Reshape has an invalid shape")
    shape = tuple(-(-array.size // known) if size == -1 else size for size in sizes)
    values = array.values if len(shape) <= 1 else None
    return [Array(shape, values)], 0


def _shape(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    array = _first(inputs)
    return [Array((len(array.shape),), array.shape if array.exact else None)], 0


def _filled(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    shape = _values(inputs[0])
    if any(size < 0 for size in shape):
        raise ValueError("ConstantOfShape has a negative size")
    value = node.tensors.get("value")
    filled = (0,) if value is None else constant_of(value).values
    count = math.prod(shape)
    follow = len(shape) <= 1 and count <= _FOLLOWED and filled is not None and len(filled) == 1
    return [Array(shape, (filled or (0,)) * count if follow else None)], count


def _expand(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    shape = _broadcast([_first(inputs).shape, tuple(max(1, v) for v in _values(inputs[1]))])
    return [Array(shape)], math.prod(shape)


def _range(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    (start,), (end,), (step,) = (_values(part) for part in inputs)
    if step < 1:
        raise ValueError("Range has no positive step")
    count = max(0, -(-(end - start) // step))
    return [Array((count,))], count


def _constant_node(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    return [constant_of(node.tensors["value"])], 0


def _matmul(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    left, right = _first(inputs), _first(inputs[1:])
    a, b = list(left.shape), list(right.shape)
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"{node.kind} multiplies what are no matrices")
    if node.number("transBatchA") or node.number("transBatchB"):
        raise ValueError("transposed batches are not supported")
    for matrix, name in ((a, "transA"), (b, "transB")):
        if node.number(name):
            matrix[-2:] = matrix[-1], matrix[-2]
    batch = _broadcast([tuple(a[:-2]), tuple(b[:-2])])
    shape = (*batch, a[-2], b[-1])
    bias = inputs[2].shape if inputs[2:] and inputs[2] is not None else ()
    products = math.prod(shape) * max(a[-1], b[-2]) + math.prod(batch) * _MATRIX_COST
    if math.prod(batch) > _MAX_MATRICES:
        raise ValueError(f"{node.kind} multiplies too many matrices")
    return [Array(_broadcast([shape, bias]))], products


def _quantised_matmul(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    array, columns = _first(inputs), node.number("N")
    shape = (*array.shape[:-1], columns)
    return [Array(shape)], math.prod(shape) * max(node.number("K"), array.shape[-1])


def _attention(node: Node, inputs: _Inputs) -> tuple[list[Array], int]:
    """The packed queries, keys and values are at least as wide as the output. The caches are
    outputs of the graph; what attending to them costs is in the nature of a long context."""
    array = _first(inputs)
    caches = [Array(part.shape) for part in inputs[3:5] if part is not None]
    return [Array(array.shape), *caches], array.size


def _by_kind() -> dict[str, _Rule]:
    rules: dict[str, _Rule] = {
        "Concat": _concat, "Constant": _constant_node, "ConstantOfShape": _filled,
        "Expand": _expand, "Flatten": _flatten, "FusedMatMul": _matmul, "Gather": _gather,
        "GatherBlockQuantized": _gather_quantised, "Gemm": _matmul,
        "GroupQueryAttention": _attention, "MatMul": _matmul, "MatMulBnb4": _quantised_matmul,
        "MatMulNBits": _quantised_matmul, "Pad": _pad, "Range": _range, "Reshape": _reshape,
        "Shape": _shape, "Slice": _slice, "Split": _split, "Squeeze": _squeeze,
        "Transpose": _transpose, "Unsqueeze": _unsqueeze,
    }  # fmt: skip
    for names, rule in (
        ("Add And Div Equal Greater GreaterOrEqual Max Min Mul Pow Sub Where", _elementwise),
        ("ReduceMax ReduceMean ReduceSum", _reduce),
        (
            "Cast CumSum Erf Gelu Identity LayerNormalization Relu Sigmoid"
            " SimplifiedLayerNormalization SkipSimplifiedLayerNormalization Softmax Sqrt Tanh",
            _same,
        ),
    ):
        rules.update(dict.fromkeys(names.split(), rule))
    return rules


_RULES = _by_kind()
