"""From a backbone, skills and a router, or from a bundle, to a folder that vLLM serves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dlp_edge import __version__
from dlp_edge.atomic.staging import check_space, check_target, staged
from dlp_edge.bundle import files
from dlp_edge.bundle.adapter_stack import LoraPair
from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.manifest import AdapterEntry, RouterEntry, RouterManifest, ServedBackbone
from dlp_edge.bundle.peft_reader import read_adapters
from dlp_edge.bundle.router_folder import ROUTING, dump_routing, file_entries
from dlp_edge.errors import BackboneError
from dlp_edge.export.pipeline import Progress, check_labels, check_template
from dlp_edge.export.router import export_router, router_labels
from dlp_edge.export.source import Source, load_source
from dlp_edge.export.vllm import launch
from dlp_edge.export.vllm.capacity import Capacity, capacity_of
from dlp_edge.export.vllm.model_folder import write_model
from dlp_edge.export.vllm.skill_folders import write_skill

MODEL, SKILLS, ROUTER = "model", "skills", "router"

Skills = Mapping[str, Mapping[str, LoraPair]]


def export_for_vllm(
    backbone: str,
    adapters: Mapping[str, Path],
    router: Path | None,
    out: Path,
    chat_template: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the folder from the sources; see `export_bundle` for the arguments.

    Returns:
        What was written, for the reader.

    Raises:
        UsageError, BackboneError, AdapterError, RouterError, ResourceError: an input is invalid,
            or the disk is full. No partial folder is left behind.
    """
    notify = on_progress or (lambda step, fraction: None)
    check_template(chat_template)
    check_target(out, is_export)
    if router is not None:
        check_labels(router_labels(router), adapters)
    with staged(out, is_export) as staging, _source(backbone, notify) as source:
        template = source.chat_template if chat_template is None else chat_template
        check_template(template)
        notify("reading the adapters", 0.4)
        loaded = read_adapters(adapters, source.linear_sizes())
        notify("exporting the router", 0.45)
        folder = staging / ROUTER
        folder.mkdir()
        entry = None if router is None else export_router(router, folder)
        return _write(
            source,
            template,
            {adapter.name: adapter.pairs for adapter in loaded},
            tuple(adapter.entry for adapter in loaded),
            entry,
            staging,
            notify,
        )


def convert_for_vllm(
    bundle: Bundle, backbone: str, out: Path, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the folder from a bundle, which has everything but the backbone's own weights.

    Args:
        backbone: the folder, GGUF file or hub id that the bundle was exported from.

    Raises:
        BackboneError: it is another one.
        BundleError, UsageError, ResourceError: the bundle is damaged, or the output cannot be
            written.
    """
    notify = on_progress or (lambda step, fraction: None)
    manifest = bundle.manifest
    check_target(out, is_export)
    with staged(out, is_export) as staging, _source(backbone, notify) as source:
        if source.fingerprint != manifest.backbone.fingerprint:
            raise BackboneError(
                f"the bundle was not made from {backbone}, but from {manifest.backbone.name}",
                "Give the backbone that it was exported from",
            )
        stack = bundle.adapters()
        skills = {
            name: {
                module: LoraPair(stack.a[module][at.slice], stack.b[module][at.slice], at.scaling)
                for module, at in rows.items()
            }
            for name, rows in stack.rows.items()
        }
        folder = staging / ROUTER
        folder.mkdir()
        if manifest.router is not None:
            for name in files.router_files(manifest.router):
                (folder / name).write_bytes(bundle.read(files.file_name(manifest, name)))
        template = manifest.chat_template
        return _write(source, template, skills, manifest.adapters, manifest.router, staging, notify)


def is_export(folder: Path) -> bool:
    """Whether a folder looks like such an export, so that another one may replace it."""
    return (folder / ROUTER / ROUTING).is_file() and (folder / launch.SCRIPT).is_file()


def _source(backbone: str, notify: Progress) -> AbstractContextManager[Source]:
    notify("reading the backbone", 0.0)
    return load_source(
        backbone, on_progress=lambda done: notify("reading the backbone", 0.4 * done)
    )


def _write(
    source: Source,
    template: str | None,
    skills: Skills,
    entries: tuple[AdapterEntry, ...],
    router: RouterEntry | None,
    staging: Path,
    notify: Callable[[str, float], None],
) -> dict[str, Any]:
    """Everything but the router's own files, which are in the staging folder already."""
    rule = None if router is None else router.selection
    capacity = capacity_of([entry.rank for entry in entries], rule, skills)
    weights = sum(path.stat().st_size for path in source.folder.glob("*.safetensors"))
    check_space(staging, weights)
    notify("writing the skills", 0.5)
    for name, pairs in skills.items():
        write_skill(pairs, source.name, staging / SKILLS / name)
    notify("copying the backbone", 0.55)
    write_model(source, template, staging / MODEL)
    notify("finishing", 0.95)
    context = int(source.config["max_position_embeddings"])
    _write_routing(source, template, entries, router, capacity, context, staging / ROUTER)
    script = staging / launch.SCRIPT
    script.write_text(launch.script(capacity, context), encoding="utf-8", newline="\n")
    script.chmod(0o755)
    (staging / launch.PAGE).write_text(
        launch.page(source.name, list(skills), capacity, context), encoding="utf-8"
    )
    notify("done", 1.0)
    return {
        "backbone": source.name,
        "skills": list(skills),
        "max_skills": capacity.max_skills,
        "max_rank": capacity.max_rank,
        "max_lora_rank": capacity.lora_rank,
        "bytes": {
            name: sum(path.stat().st_size for path in (staging / name).rglob("*") if path.is_file())
            for name in (MODEL, SKILLS, ROUTER)
        },
    }


def _write_routing(
    source: Source,
    template: str | None,
    entries: tuple[AdapterEntry, ...],
    router: RouterEntry | None,
    capacity: Capacity,
    context: int,
    folder: Path,
) -> None:
    shutil.copyfile(source.folder / "tokenizer.json", folder / files.TOKENIZER)
    manifest = RouterManifest(
        created_with=__version__,
        backbone=ServedBackbone(
            source.name,
            source.fingerprint,
            context,
            int(source.config["vocab_size"]),
            source.bos_token,
            source.eos_token,
            source.eos_token_ids,
        ),
        chat_template=template,
        adapters=entries,
        router=router,
        max_skills=capacity.max_skills,
        max_rank=capacity.max_rank,
        files=file_entries(folder, router),
    )
    (folder / ROUTING).write_text(dump_routing(manifest), encoding="utf-8")
