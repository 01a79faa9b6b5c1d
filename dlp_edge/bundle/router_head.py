"""The router's last layer as data: one row for each adapter, plus out-of-scope rows.

The graph computes features f; the scores are z = W f + b. Storing W and b outside the graph lets
a runtime without torch or onnx add or remove an adapter's row. Some features of every existing
skill are stored as well, as negatives for fitting a new row.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dlp_edge.errors import RouterError
from dlp_edge.untrusted.safetensors_header import check_bytes

Matrix = npt.NDArray[np.float32]
Half = npt.NDArray[np.float16]
Index = npt.NDArray[np.int64]

_REMEDY = "Train the router again, or export the bundle again"
_TENSORS = {"weight", "bias", "features", "rows"}


@dataclass(frozen=True)
class RouterHead:
    """A linear layer of R rows over F features.

    The first rows belong to the router's labels, in order. The remaining rows are out-of-scope:
    text of no skill, and text of removed skills.

    Attributes:
        weight: W [R, F] float32.
        bias: b [R] float32.
        features: f [M, F] float16 of known text, used to fit new rows.
        rows: [M] int64, the row that each feature vector belongs to.
    """

    weight: Matrix
    bias: Matrix
    features: Half
    rows: Index

    def __post_init__(self) -> None:
        count, width = self.weight.shape if self.weight.ndim == 2 else (0, 0)
        fits = (
            count > 0
            and width > 0
            and self.bias.shape == (count,)
            and self.features.ndim == 2
            and self.features.shape[1] == width
            and self.rows.shape == (len(self.features),)
        )
        if not fits:
            raise RouterError("the tensors of the router's last layer do not fit", _REMEDY)
        if not all(np.isfinite(part).all() for part in (self.weight, self.bias, self.features)):
            raise RouterError("the router's last layer is not finite", _REMEDY)
        if len(self.rows) and not 0 <= self.rows.min() <= self.rows.max() < count:
            raise RouterError("the router's last layer has features of no row", _REMEDY)

    def scores(self, features: Matrix) -> npt.NDArray[np.float64]:
        """Returns z [n, R] for features [n, F]."""
        z: npt.NDArray[np.float64] = (features @ self.weight.T + self.bias).astype(np.float64)
        return z

    def with_row(self, at: int, weight: Matrix, bias: float, features: Half) -> RouterHead:
        """Inserts a row [F] at index `at`, with the features [k, F] it was fitted on."""
        rows = self.rows + (self.rows >= at)
        return RouterHead(
            np.insert(self.weight, at, weight, axis=0),
            np.insert(self.bias, at, bias),
            np.concatenate([self.features, features]),
            np.concatenate([rows, np.full(len(features), at, np.int64)]),
        )

    def disowned(self, at: int) -> RouterHead:
        """Moves row `at` to the end, among the out-of-scope rows."""
        order = [row for row in range(len(self.bias)) if row != at] + [at]
        rank = np.argsort(order)
        return RouterHead(self.weight[order], self.bias[order], self.features, rank[self.rows])

    def without(self, removed: Collection[int]) -> RouterHead:
        """Removes rows and their features."""
        remaining = np.array([row for row in range(len(self.bias)) if row not in removed])
        kept = np.isin(self.rows, remaining)
        rank = np.searchsorted(remaining, self.rows[kept])
        return RouterHead(self.weight[remaining], self.bias[remaining], self.features[kept], rank)


def head_to_bytes(head: RouterHead) -> bytes:
    """Serializes a head as the content of `router_head.safetensors`."""
    return save(
        {
            "weight": np.ascontiguousarray(head.weight),
            "bias": np.ascontiguousarray(head.bias),
            "features": np.ascontiguousarray(head.features),
            "rows": np.ascontiguousarray(head.rows),
        }
    )


def head_from_bytes(data: bytes) -> RouterHead:
    """Reads what `head_to_bytes` wrote.

    Raises:
        RouterError: the bytes are not such a file, or the tensors' shapes are incompatible.
    """
    try:
        check_bytes(data)
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RouterError(f"the router's last layer cannot be read ({error})", _REMEDY) from error
    if set(tensors) != _TENSORS:
        raise RouterError(
            f"the router's last layer holds {sorted(tensors)}, expected {sorted(_TENSORS)}", _REMEDY
        )
    return RouterHead(
        tensors["weight"].astype(np.float32),
        tensors["bias"].astype(np.float32),
        tensors["features"].astype(np.float16),
        tensors["rows"].astype(np.int64),
    )
