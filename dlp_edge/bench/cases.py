"""What is compared: the same work under several fusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlp_edge.bundle.adapter_stack import AdapterStack, LoraPair, pack
from dlp_edge.runtime.decoding.engine import Engine, make_engine
from dlp_edge.runtime.loaded_bundle import LoadedBundle
from dlp_edge.runtime.routing.router import Router

SYNTHETIC_RANK = 8  # the paper's
Fusion = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        fusions: what is fused; of several, the next one at every sentence.
        router: asked at every sentence, where there is one.
    """

    engine: Engine
    fusions: Sequence[Fusion]
    router: Router | None = None


def own_cases(loaded: LoadedBundle, others: Mapping[str, Router]) -> dict[str, Case]:
    """The cases of a bundle's own adapters, as far as it has enough of them.

    `base`, then `one`, `two` and `four` fused throughout; `dlp`: at every sentence the router is
    asked and two adapters are fused anew; and `dlp NAME` with each other router.
    """
    engine, names = loaded.engine, [entry.name for entry in loaded.manifest.adapters]
    cases = {"base": Case(engine, [{}])}
    for case, count in (("one", 1), ("two", 2), ("four", 4)):
        if len(names) >= count:
            cases[case] = Case(engine, [dict.fromkeys(names[:count], 1 / count)])
    if len(names) < 2:
        return cases
    turns = [{a: 0.6, b: 0.4} for a, b in zip(names, names[1:] + names[:1], strict=True)]
    if loaded.router is not None:
        cases["dlp"] = Case(engine, turns, loaded.router)
    return cases | {f"dlp {name}": Case(engine, turns, router) for name, router in others.items()}


def synthetic_cases(loaded: LoadedBundle, counts: Sequence[int]) -> dict[str, Case]:
    """`N adapters` for each N: two of N random ones, others at every sentence.

    They have rank 8 and change the matrices that the bundle's own adapters change.
    """
    cases = {}
    for count in counts:
        stack = _random_stack(loaded.stack, count)
        engine = make_engine(loaded.backbone, stack, loaded.engine.decoder.max_context)
        cases[f"{count} adapters"] = Case(
            engine, [{"0": 0.6, str(other): 0.4} for other in range(1, count)]
        )
    return cases


def _random_stack(like: AdapterStack, count: int) -> AdapterStack:
    rng = np.random.default_rng(0)
    dtype = next(iter(like.a.values())).dtype
    pairs = [
        {
            module: LoraPair(
                rng.normal(0, 0.01, (SYNTHETIC_RANK, a.shape[1])).astype(dtype),
                rng.normal(0, 0.01, (SYNTHETIC_RANK, like.b[module].shape[1])).astype(dtype),
                1.0,
            )
            for module, a in like.a.items()
        }
        for _ in range(count)
    ]
    return pack({str(number): pair for number, pair in enumerate(pairs)}, dtype.name)
