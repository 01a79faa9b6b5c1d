"""`dlp-edge inspect BUNDLE`: what is in a bundle, without loading it."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from dlp_edge.bundle.edition import read_current
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.cli import options, output
from dlp_edge.errors import DeviceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("inspect", help="show the contents of a bundle")
    options.add_bundle(parser)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    manifest, report = read_current(
        arguments.bundle, lambda bundle: (bundle.manifest, bundle.report())
    )
    kernels = _kernels(manifest)
    if arguments.json:
        output.print_json({"manifest": asdict(manifest), "report": report, "kernels": kernels})
        return 0
    backbone, perplexity = manifest.backbone, report["perplexity"]
    total = sum(entry.size for entry in manifest.files.values())
    print(f"backbone   {backbone.name} ({backbone.architecture}, {backbone.num_layers} layers)")
    targets = ", ".join(manifest.targets)
    print(f"format     {backbone.quantisation} for {targets}, {total / 1e6:.0f} MB")
    for line in _devices(manifest):
        print(f"device     {line}")
    if kernels is not None:
        print(f"kernels    {kernels}")
    print(f"context    {backbone.context_length} tokens")
    print(f"perplexity {perplexity['ratio']:.4f} x the source's ({perplexity['tokens']} tokens)")
    labels = tuple(adapter.name for adapter in manifest.adapters)
    if manifest.router is None:
        print("router     none: adapters are pinned")
    else:
        labels = manifest.router.settings.labels
        rule = manifest.router.selection
        limit = {"nucleus": f"p={rule.p}", "threshold": f"p={rule.p}", "top_k": f"k={rule.k}"}
        print(
            f"router     {manifest.router.architecture}, {rule.select} {limit[rule.select]}, "
            f"{rule.weigh}"
        )
    print(f"adapters   {len(manifest.adapters)}")
    for adapter in manifest.adapters:
        routed = "" if adapter.name in labels else "  (pinned only: the router does not know it)"
        targets = ", ".join(target.split(".")[-1] for target in adapter.target_modules)
        print(f"  {adapter.name:<16} rank {adapter.rank:<3} {targets}{routed}")
    return 0


def _devices(manifest: Manifest) -> list[str]:
    """What `device="auto"` would choose on this machine, and why not another."""
    if manifest.targets == ("cpu",):
        return []
    try:
        from dlp_edge.runtime.engine.device import choose_device
        from dlp_edge.runtime.memory import device_bytes
    except ImportError:
        return []
    try:
        device = choose_device("auto", manifest.target, None, device_bytes(manifest, 4096))
    except DeviceError as error:
        return [f"none: {error}"]
    return [str(device), *filter(None, device.reason.split("; "))]


def _kernels(manifest: Manifest) -> str | None:
    """What would multiply the matrices on this machine; None where that is onnxruntime's to say."""
    if "cpu" not in manifest.targets:
        return None
    try:
        from dlp_edge.runtime.engine.operators import kernels_of
    except ImportError:
        return "onnxruntime is not installed"
    return kernels_of(manifest.backbone)
