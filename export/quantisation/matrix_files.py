"""Quantised matrices in files: a model's own may not fit in memory, and an interrupted export
finds them again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dlp_edge.atomic.sharing import move
from dlp_edge.export.quantisation.quantized_matrix import QuantizedMatrix


class MatrixFiles:
    """4-bit matrices by name, one file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def __getitem__(self, name: str) -> QuantizedMatrix:
        with np.load(self._path(name)) as file:
            return QuantizedMatrix(4, file["levels"], file["scales"], file["zeros"])

    def __setitem__(self, name: str, matrix: QuantizedMatrix) -> None:
        if matrix.zeros is None:
            raise AssertionError("4-bit matrices have zeros")
        part = self._path(name).with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, levels=matrix.levels, scales=matrix.scales, zeros=matrix.zeros)
        move(part, self._path(name))

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
