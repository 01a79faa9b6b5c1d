"""What each engine reads, made from one GGUF file and PEFT adapters."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engines.adapters import make_up, write_gguf
from benchmarks.engines.q8 import write_q8
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.peft_reader import WEIGHTS, PeftAdapter, read_adapter
from dlp_edge.errors import AdapterError
from dlp_edge.export.backbone import build_graph
from dlp_edge.export.gguf_file import dequantise_gguf
from dlp_edge.export.source import load_source
from dlp_edge.models.architectures import PROJECTIONS
from dlp_edge.runtime.adapters.edit import add_skill
from dlp_edge.runtime.routing.policy import load_router

Fusion = Mapping[str, float]
# What is fused in each case.
CASES: dict[str, Fusion] = {
    "base": {},
    "2 x r=8, q v": {"stratqa": 0.6, "unitconv": 0.4},
    "2 x r=8, all": {"made-up-8a": 0.6, "made-up-8b": 0.4},
    "2 x r=16, all": {"gsm8k": 0.6, "made-up-16": 0.4},
}
_QV = ("q_proj", "v_proj")
_ALL = tuple(projection.module.split(".")[1] for projection in PROJECTIONS)
# Rank and targets of each adapter, where the folder of adapters has no such one.
SHAPES = {
    "stratqa": (8, _QV),
    "unitconv": (8, _QV),
    "made-up-8a": (8, _ALL),
    "made-up-8b": (8, _ALL),
    "gsm8k": (16, _ALL),
    "made-up-16": (16, _ALL),
}
# onnxruntime-genai's builder: its formats nearest to ours.
GENAI: dict[str, tuple[str, dict[str, str]]] = {
    "int4": ("int4", {"algo_config": "k_quant_mixed"}),
    "int8": ("int8", {}),
}


@dataclass(frozen=True)
class Contestant:
    """An engine with its weights.

    Attributes:
        name: in the tables.
        python: the interpreter of its environment.
        options: of its worker.
        settings: what was chosen for it, in words.
        cases: names of those that it can do.
        shared: one process does all cases; otherwise each has one, with that case's adapters.
        slow: takes part in the first round only (see `match`).
    """

    name: str
    python: str
    options: dict[str, Any]
    settings: str
    cases: tuple[str, ...] = tuple(CASES)
    shared: bool = True
    slow: bool = False

    def options_of(self, cases: Sequence[str]) -> dict[str, Any]:
        """The options of a worker that is to do these cases, and needs no other adapters."""
        if "adapters" not in self.options:
            return dict(self.options)
        needed = {name for case in cases for name in CASES[case]}
        files = self.options["adapters"]
        return self.options | {"adapters": {name: files[name] for name in files if name in needed}}


class Kitchen:
    """Makes each engine's files, all in one folder; what lies there already is used as it is, but
    for the bundles."""

    def __init__(self, gguf: Path, adapters: Path | None, threads: int, folder: Path) -> None:
        """Dequantises the backbone, and makes up the adapters that the folder of them lacks."""
        self._gguf, self._folder = gguf, folder
        self._common = {"threads": threads}
        self.dense = self._once("source", lambda path: _dequantise(gguf, path))
        with load_source(str(self.dense)) as source:
            self._config, sizes = source.config, source.linear_sizes()
        self._adapters: dict[str, PeftAdapter] = {}
        for seed, (name, (rank, targets)) in enumerate(SHAPES.items()):
            path = adapters / name if adapters else folder / name
            if not path.is_dir():
                make = partial(make_up, sizes=sizes, rank=rank, targets=targets, seed=seed)
                path = self._once(name, make)
            self._adapters[name] = read_adapter(name, path, sizes)

    def dlp(self, name: str, bundle: Path, python: str) -> Contestant:
        """A copy of a bundle, with those adapters that it lacks and has slots for."""
        copy = self._folder / f"bundle-{name}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bundle, copy)
        opened = open_bundle(copy)
        router = load_router(opened)
        for adapter in self._adapters.values():
            if adapter.name not in [entry.name for entry in opened.manifest.adapters]:
                try:
                    opened = add_skill(opened, router, adapter.name, adapter.folder)
                except AdapterError as error:
                    print(f"{name}: {error}", file=sys.stderr)
        has = {entry.name for entry in opened.manifest.adapters}
        cases = tuple(case for case, fusion in CASES.items() if has.issuperset(fusion))
        options = {"engine": "dlp", "bundle": str(copy), **self._common}
        settings = f"{opened.manifest.backbone.quantisation}, as Runtime loads it"
        return Contestant(f"dlp-edge {name}", python, options, settings, cases)

    def llama(self, quantisation: str, python: str) -> Contestant:
        """The GGUF file itself ("int4"), or in Q8_0, and the adapters as such files."""
        heads = self._config["num_attention_heads"]
        kv_heads = self._config.get("num_key_value_heads") or heads
        files = {
            name: str(
                self._once(f"{name}.gguf", partial(write_gguf, adapter.pairs, heads, kv_heads))
            )
            for name, adapter in self._adapters.items()
        }
        model = str(self._weights(quantisation))
        options = {"engine": "llama", "model": model, "adapters": files, **self._common}
        settings = "flash attention, memory-mapped, batches of 512, adapters in fp16"
        name = "llama.cpp" if quantisation == "int4" else "llama.cpp Q8_0"
        return Contestant(name, python, options, settings)

    def genai(self, quantisation: str, python: str) -> Contestant:
        """The builder's own graph."""
        precision, extra = GENAI[quantisation]
        extra = {**extra, "prune_lm_head": "true"}

        def build(path: Path) -> None:
            path.mkdir()
            build_graph(self.dense, precision, "cpu", path, extra)

        folder = self._once(f"genai-{quantisation}", build)
        options = {"engine": "genai", "folder": str(folder), **self._common}
        settings = f"its builder's {precision}, {extra}"
        return Contestant(f"genai {quantisation}", python, options, settings, ("base",))

    def openvino(self, quantisation: str, python: str) -> Contestant:
        """The GGUF file, or its weights in Q8_0, as OpenVINO reads them."""
        gguf = self._weights(quantisation)
        command = [python, "-m", "benchmarks.engines.openvino_model", str(gguf)]
        folder = self._once(
            f"openvino-{quantisation}",
            lambda path: subprocess.run([*command, str(path)], check=True, stdout=sys.stderr),
        )
        files = {
            name: (str(adapter.folder / WEIGHTS), _scaling(adapter))
            for name, adapter in self._adapters.items()
        }
        options = {"engine": "openvino", "folder": str(folder), "adapters": files, **self._common}
        settings = f"{quantisation} by its GGUF reader; stateful pipeline (SDPA)"
        return Contestant(f"OpenVINO {quantisation}", python, options, settings, shared=False)

    def torch(self, engine: str, name: str, python: str, settings: str) -> Contestant:
        """The dense weights and PEFT's own files."""
        files = {adapter.name: str(adapter.folder) for adapter in self._adapters.values()}
        options = {"engine": engine, "folder": str(self.dense), "adapters": files, **self._common}
        return Contestant(name, python, options, settings, slow=True)

    def _weights(self, quantisation: str) -> Path:
        """The GGUF file, which is in 4 bits, or the same weights in 8."""
        if quantisation == "int4":
            return self._gguf
        return self._once("q8.gguf", partial(write_q8, self._gguf))

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The path of something in the folder, made if it is not there yet."""
        path, part = self._folder / name, self._folder / f"part-{name}"
        if not path.exists():
            print(f"making {name}", file=sys.stderr)
            if part.is_dir():
                shutil.rmtree(part)
            make(part)
            part.rename(path)
        return path


def _dequantise(gguf: Path, path: Path) -> None:
    path.mkdir()
    dequantise_gguf(gguf, path)


def _scaling(adapter: PeftAdapter) -> float:
    (scaling,) = {pair.scaling for pair in adapter.pairs.values()}
    return scaling
