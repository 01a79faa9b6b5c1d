"""The entry point of the library: one complete evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlp_edge import __version__
from dlp_edge.atomic.lock import locked
from dlp_edge.evaluation.plan import EvalSettings, make_plan
from dlp_edge.evaluation.questions import rooms_of
from dlp_edge.evaluation.results import collect
from dlp_edge.evaluation.runner import OnProgress, run_plan
from dlp_edge.evaluation.store import Store
from dlp_edge.evaluation.tasks import EvalTask
from dlp_edge.runtime.runtime import Runtime

ANSWERS = "answers.jsonl"


def evaluate(
    runtime: Runtime,
    tasks: Sequence[EvalTask],
    folder: Path,
    settings: EvalSettings | None = None,
    examples: int = 10,
    on_progress: OnProgress = lambda what, fraction: None,
) -> dict[str, Any]:
    """Evaluate a bundle on tasks; returns the results document that `write_report` takes.

    Args:
        folder: where answers are stored (`answers.jsonl`). Interrupted runs resume from it; answers
            of another bundle, task or option are not reused.
        examples: how many losses of routing to include.
        on_progress: called with (the last answer's task and system, fraction done).

    Raises:
        UsageError: see `make_plan`.
        ResourceError: the folder cannot be written, or another evaluation is writing there.
    """
    settings = settings or EvalSettings()
    adapters = [adapter.name for adapter in runtime.adapters]
    rooms = rooms_of(tasks, runtime.count_tokens, settings.max_new_tokens)
    plan = make_plan(tasks, adapters, rooms, settings)
    manifest = repr(runtime.manifest)  # includes the checksum of every file
    digest = hashlib.sha256(f"{__version__} {runtime.device} {manifest}".encode()).hexdigest()
    with locked(folder / ANSWERS):
        store = Store(folder / ANSWERS, digest)
        try:
            answers = run_plan(runtime, plan, store, settings, on_progress)
        finally:
            store.close()
    backbone = runtime.manifest.backbone
    router = runtime.manifest.router
    return {
        "bundle": {
            "backbone": backbone.name,
            "quantisation": backbone.quantisation,
            "adapters": adapters,
            "router": router.architecture if router else None,
            "digest": digest,
            "device": str(runtime.device),
        },
        "settings": asdict(settings),
        **collect(tasks, plan, answers, settings, examples),
    }
