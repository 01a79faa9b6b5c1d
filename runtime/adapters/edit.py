"""Add an adapter to an exported bundle, or remove one, without torch or the backbone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dlp_edge.bundle import adapter_stack
from dlp_edge.bundle.adapter_stack import AdapterStack, LoraPair
from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.edition import check_current, write_edition
from dlp_edge.bundle.files import ADAPTERS, ROUTER_HEAD
from dlp_edge.bundle.manifest import Manifest, RouterEntry
from dlp_edge.bundle.peft_reader import read_adapter
from dlp_edge.bundle.router_head import RouterHead, head_to_bytes
from dlp_edge.errors import AdapterError, UsageError
from dlp_edge.runtime.adapters.fit_router_row import as_samples, fit_router_row
from dlp_edge.runtime.options import check_names
from dlp_edge.runtime.routing.router import Router

Examples = Sequence[str | Mapping[str, object]]


def add_skill(
    bundle: Bundle, router: Router | None, name: str, folder: str | Path, examples: Examples = ()
) -> Bundle:
    """Pack a PEFT adapter into the bundle and fit a router row to its examples.

    Args:
        router: the bundle's, from `load_router`.
        name: the adapter's name in the bundle.
        folder: a PEFT adapter's folder.
        examples: prompts, or {"prompt", "response"?, "choices"?}; without any the adapter can be
            pinned but is never routed to.

    Returns:
        The new bundle. A UserWarning says where the adapter names another base model.

    Raises:
        AdapterError: the adapter cannot be read, does not fit the backbone, needs a slot that the
            graph lacks, or is already in the bundle under another name.
        UsageError: the name is taken, the examples are no list of a valid length, or there is no
            router to fit.
        RouterError: an example is invalid.
        BundleError, ResourceError: writing failed; the bundle is unchanged.
    """
    check_current(bundle)
    manifest = bundle.manifest
    others = [entry.name for entry in manifest.adapters]
    if name in others:
        raise UsageError(
            f"the bundle has an adapter {name!r} already", "Remove it first, or choose another name"
        )
    adapter = read_adapter(name, Path(folder), _slot_sizes(manifest), True, others)
    for entry in manifest.adapters:
        if entry.sha256 == adapter.sha256:
            raise AdapterError(
                f"adapters {entry.name} and {name} have the same weights", "Leave one out"
            )
    remark = adapter.other_base(manifest.backbone.name)
    if remark is not None:
        warnings.warn(remark, stacklevel=2)
    router_entry, head = _fit_router(manifest.router, router, name, examples)
    pairs = _pairs(bundle.adapters())
    packed = adapter_stack.pack({**pairs, name: adapter.pairs}, manifest.backbone.dtype)
    manifest = replace(manifest, adapters=(*manifest.adapters, adapter.entry), router=router_entry)
    return write_edition(bundle, manifest, _files(packed, head))


def remove_skill(bundle: Bundle, router: Router | None, name: str) -> Bundle:
    """Remove an adapter from the bundle; its router row becomes an out-of-scope row.

    Returns:
        The new bundle.

    Raises:
        UsageError: the bundle has no such adapter.
        BundleError, ResourceError: writing failed; the bundle is unchanged.
    """
    check_current(bundle)
    manifest = bundle.manifest
    check_names([name], [entry.name for entry in manifest.adapters])
    pairs = _pairs(bundle.adapters())
    del pairs[name]
    entry, head = manifest.router, router.head if router else None
    if entry is not None and head is not None and name in entry.settings.labels:
        head = head.disowned(entry.settings.labels.index(name))
        labels = tuple(label for label in entry.settings.labels if label != name)
        entry = replace(entry, settings=replace(entry.settings, labels=labels))
    remaining = tuple(adapter for adapter in manifest.adapters if adapter.name != name)
    packed = adapter_stack.pack(pairs, manifest.backbone.dtype)
    return write_edition(
        bundle, replace(manifest, adapters=remaining, router=entry), _files(packed, head)
    )


def _fit_router(
    entry: RouterEntry | None, router: Router | None, name: str, examples: Examples
) -> tuple[RouterEntry | None, RouterHead | None]:
    """The router's manifest entry and last layer, with a row for the examples if there are any."""
    if not examples:
        return entry, router.head if router else None
    if entry is None or router is None:
        raise UsageError(
            "the bundle has no router to train on the examples",
            "Leave them out and pin the adapter, or export with --router",
        )
    head = fit_router_row(router, as_samples(examples))
    labels = (*entry.settings.labels, name)
    return replace(entry, settings=replace(entry.settings, labels=labels)), head


def _slot_sizes(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """module -> (inputs, outputs), for the linear layers with a slot."""
    return {
        part.module: (slot.input_size, part.stop - part.start)
        for slot in manifest.backbone.slots
        for part in slot.parts
    }


def _pairs(packed: AdapterStack) -> dict[str, dict[str, LoraPair]]:
    return {name: adapter_stack.unpack(packed, name) for name in packed.rows}


def _files(packed: AdapterStack, head: RouterHead | None) -> dict[str, bytes]:
    files = {ADAPTERS: adapter_stack.to_bytes(packed)}
    return files if head is None else {**files, ROUTER_HEAD: head_to_bytes(head)}
