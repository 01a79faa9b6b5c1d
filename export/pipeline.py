"""`export_bundle`: the steps from backbone, adapters and router to a bundle."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dlp_edge import __version__
from dlp_edge.atomic.staging import check_space, check_target, staged
from dlp_edge.bundle import adapter_stack, files
from dlp_edge.bundle.bundle import dump_manifest
from dlp_edge.bundle.manifest import BackboneEntry, FileEntry, Manifest
from dlp_edge.bundle.peft_reader import PeftAdapter, read_adapters
from dlp_edge.errors import BackboneError, DlpEdgeError, RouterError
from dlp_edge.export import greedy, report
from dlp_edge.export.backbone import (
    DenseBackbone,
    check_format,
    check_half,
    check_target_names,
    graph_target,
    needs_half,
)
from dlp_edge.export.plan import plan_export
from dlp_edge.export.router import export_router, router_labels
from dlp_edge.export.source import Source, dequantised_bytes, load_source
from dlp_edge.export.work_folder import stamp, work_folder
from dlp_edge.runtime.decoding.engine import make_engine
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.device import choose_device
from dlp_edge.runtime.engine.ort_errors import LOADING, memory_for
from dlp_edge.untrusted.chat_template import ChatTemplate
from dlp_edge.untrusted.regular_file import sha256_of

LARGEST_LOSS = 1.02  # perplexity ratio above which the default format gets a remark

Progress = Callable[[str, float], None]


def export_bundle(
    backbone: str,
    adapters: Mapping[str, Path],
    router: Path | None,
    out: Path,
    quantisation: str | None = None,
    target: str = "cpu",
    chat_template: str | None = None,
    on_progress: Progress | None = None,
    fast: bool = False,
    calibration: str | None = None,
) -> dict[str, Any]:
    """Write a bundle folder; returns the content of its `report.json`.

    Args:
        backbone: a folder, a GGUF file or a hub id.
        adapters: name -> folder of a PEFT adapter.
        router: a folder written by `dlp-edge train-router`; None makes a bundle without routing,
            whose adapters the application pins.
        out: the bundle to write; an existing one is replaced only once the new one is complete.
        quantisation: one of `FORMATS` for the target; None picks the fastest within 1.02 times the
            source's perplexity.
        target: "cpu", "cuda" or "webgpu", the device that the bundle is for; or several, joined by
            commas, which share one graph in single precision.
        chat_template: Jinja text instead of the backbone's own template.
        on_progress: called with (step, fraction).
        fast: measure the perplexity on less text, and leave out what only the report needs: greedy
            answers and time per token.
        calibration: text for the int4 search instead of the package's own.

    Raises:
        UsageError, BackboneError, AdapterError, RouterError, ResourceError: an input is invalid,
            or there is not enough disk space or memory. No partial bundle is left behind.

    A killed or interrupted export keeps its intermediate results beside `out`; the same call
    resumes from them.
    """
    notify = on_progress or (lambda step, fraction: None)
    check_format(quantisation, target)
    target = check_target_names(target)
    check_template(chat_template)
    check_target(out, is_bundle)
    if router is not None:
        check_labels(router_labels(router), adapters)

    if Path(backbone).exists():
        plan_export(backbone, quantisation, target).check_memory()
    start_time = time.perf_counter()
    reading = "reading the backbone"
    notify(reading, 0.0)
    check_space(out.resolve(), 4 * dequantised_bytes(backbone))  # dequantised weights
    key = {
        "version": __version__,
        "backbone": [str(Path(backbone).resolve()), stamp(Path(backbone))],
        "target": target,
        "calibration": calibration,
    }
    with (
        staged(out, is_bundle) as staging,
        work_folder(out.resolve(), key) as work,
        load_source(backbone, work, lambda done: notify(reading, 0.12 * done)) as source,
    ):
        template = source.chat_template if chat_template is None else chat_template
        check_template(template)
        sizes = source.linear_sizes()
        notify("reading the adapters", 0.15)
        loaded = read_adapters(adapters, sizes)
        weights = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
        check_space(out, 3 * weights)  # dense weights, which double if they are bf16

        notify("building the backbone", 0.18)
        modules = {module for adapter in loaded for module in adapter.pairs}
        entry = _write_backbone(
            source, modules, quantisation, target, calibration, work, staging, notify
        )
        notify("packing the adapters", 0.65)
        stacked = adapter_stack.pack({a.name: a.pairs for a in loaded}, entry.dtype)
        (staging / files.ADAPTERS).write_bytes(adapter_stack.to_bytes(stacked))
        notify("exporting the router", 0.66)
        router_entry = None
        if router is not None:
            router_entry = export_router(router, staging)
        shutil.copyfile(source.folder / "tokenizer.json", staging / files.TOKENIZER)

        notify("comparing with transformers and PEFT", 0.68)
        asked = [] if fast else _prompts(template, source, staging, entry.context_length)
        content = _report(
            source,
            loaded,
            entry,
            target,
            stacked,
            staging,
            asked,
            lambda done: notify("comparing with transformers and PEFT", 0.78 + 0.2 * done),
        )
        if needs_half(target):
            notify("measuring half precision", 0.97)
            content["half"] = report.measure_half(entry, stacked, staging, _heldout(staging))
        content["remarks"] += _losses(content, quantisation)
        content["seconds"] = time.perf_counter() - start_time
        (staging / files.REPORT).write_text(json.dumps(content, indent=1), encoding="utf-8")
        manifest = Manifest(
            created_with=__version__,
            target=target,
            backbone=entry,
            chat_template=template,
            adapters=tuple(adapter.entry for adapter in loaded),
            router=router_entry,
            files={
                path.name: FileEntry(path.stat().st_size, sha256_of(path))
                for path in _files(staging)
            },
        )
        (staging / files.MANIFEST).write_text(dump_manifest(manifest), encoding="utf-8")
        notify("finishing", 0.98)
    notify("done", 1.0)
    return content


def _losses(content: Mapping[str, Any], quantisation: str | None) -> list[str]:
    """Remarks on a bundle that loses more than LARGEST_LOSS."""
    chosen = content["quantisation"]
    if content["perplexity"]["ratio"] <= LARGEST_LOSS:
        return []
    if quantisation is None:
        return [
            f"{chosen}, the default here, costs more than {LARGEST_LOSS} times the source's "
            "perplexity"
        ]
    return [f"int8 loses less than {chosen}"] if chosen in ("int4", "nf4") else []


def is_bundle(folder: Path) -> bool:
    """Whether a folder looks like a bundle, so that an export may replace it."""
    return (folder / files.MANIFEST).is_file() and (folder / files.BACKBONE).is_file()


def _write_backbone(
    source: Source,
    modules: set[str],
    quantisation: str | None,
    target: str,
    calibration: str | None,
    work: Path,
    staging: Path,
    notify: Progress,
) -> BackboneEntry:
    check_half(source.architecture, target)
    dense = DenseBackbone(source, modules, graph_target(target), work / "dense", calibration)
    notify("checking the weights", 0.35)
    chosen = quantisation or dense.default_format()
    step = f"quantising the backbone ({chosen})"
    return dense.write(chosen, staging, lambda done: notify(step, 0.4 + 0.25 * done))


def _files(staging: Path) -> list[Path]:
    """The bundle's files; folders beside them are scratch space."""
    return sorted(path for path in staging.iterdir() if path.is_file())


def check_template(template: str | None) -> None:
    """Raises BackboneError for a chat template that does not render."""
    try:
        ChatTemplate(template).render([{"role": "user", "content": "Hello"}])
    except DlpEdgeError as error:
        raise BackboneError(error.cause, "Give a working one with --chat-template") from error


def check_labels(labels: tuple[str, ...], adapters: Mapping[str, Path]) -> None:
    """Raises RouterError for a label that is no adapter's name."""
    unknown = sorted(set(labels) - set(adapters))
    if unknown:
        raise RouterError(
            f"the router was trained for {', '.join(unknown)}, which no adapter is called",
            "Name the adapters as the router's tasks, or train a router for these adapters",
        )


def _prompts(
    template: str | None, source: Source, staging: Path, context_length: int
) -> list[list[int]]:
    """Token ids of the comparison prompts, cut to leave room for the answers."""
    chat = ChatTemplate(template)
    encode = Tokenizer.from_file(str(staging / files.TOKENIZER)).encode
    texts = [
        chat.render([{"role": "user", "content": prompt}], source.bos_token, source.eos_token)
        for prompt in greedy.prompts()
    ]
    room = max(1, context_length - greedy.NEW_TOKENS)
    return [encode(text, add_special_tokens=False).ids[-room:] for text in texts]


def _report(
    source: Source,
    adapters: list[PeftAdapter],
    entry: BackboneEntry,
    target: str,
    stacked: adapter_stack.AdapterStack,
    staging: Path,
    asked: list[list[int]],
    on_progress: Callable[[float], None],
) -> dict[str, Any]:
    """The content of `report.json`, measured on the CPU.

    Accuracy carries over to another target; time does not, so it is left out there.
    """
    found = _run(entry, adapters, stacked, staging, asked)
    if "cpu" not in target.split(","):
        found = replace(found, milliseconds=None)
    measured = report.compare(source, adapters, found, on_progress)
    return {
        "backbone": source.name,
        "target": target,
        "quantisation": entry.quantisation,
        "bytes": {path.name: path.stat().st_size for path in _files(staging)},
        "remarks": [remark for adapter in adapters if (remark := adapter.other_base(source.name))],
        "adapters": [
            {
                "name": adapter.name,
                "rank": adapter.entry.rank,
                "target_modules": list(adapter.entry.target_modules),
                "base_model": adapter.base_model,
            }
            for adapter in adapters
        ],
        **measured,
    }


def _run(
    entry: BackboneEntry,
    adapters: list[PeftAdapter],
    stacked: adapter_stack.AdapterStack,
    staging: Path,
    asked: list[list[int]],
) -> report.Outputs:
    """Run the bundle for the report; its graph is out of memory afterwards.

    Args:
        asked: prompts to answer; none in a fast export.
    """
    with memory_for(LOADING):
        graph = open_backbone(staging / files.BACKBONE, entry, choose_device("cpu", "cpu", None))
    answers: list[list[int]] = []
    if asked:
        longest = max(len(ids) for ids in asked)
        count = min(greedy.NEW_TOKENS, entry.context_length - longest)
        side_by_side = make_engine(graph, stacked, longest + count, len(asked))
        answers = greedy.greedy_answers(side_by_side, asked, count)
        del side_by_side
    engine = make_engine(graph, stacked, min(entry.context_length, report.PERPLEXITY_TOKENS))
    ids = _heldout(staging)
    return report.run_bundle(
        engine, adapters, ids, list(zip(asked, answers, strict=True)), fast=not asked
    )


def _heldout(staging: Path) -> list[int]:
    """The held-out text in the bundle's tokens."""
    tokenizer = Tokenizer.from_file(str(staging / files.TOKENIZER))
    text = report.HELDOUT.read_text(encoding="utf-8")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
