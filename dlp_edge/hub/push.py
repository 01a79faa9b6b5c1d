"""Publishes a bundle on the Hugging Face hub, with a model card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dlp_edge.bundle.bundle import Bundle, open_bundle
from dlp_edge.bundle.files import MANIFEST
from dlp_edge.bundle.signing import SIGNATURE
from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.errors import ResourceError, UsageError
from dlp_edge.hub.fetch import HUB_ID
from dlp_edge.hub.origins import require_hub

CARD = "README.md"


def push_bundle(
    folder: Path,
    repository: str,
    private: bool = False,
    license_id: str | None = None,
    base_model: str | None = None,
) -> str:
    """Checks a bundle, and uploads it in one commit, its model card beside it.

    Args:
        repository: a hub id, `user/bundle`; made if there is none.
        license_id: for the card, such as `apache-2.0`.
        base_model: the backbone's hub id, for the card.

    Returns:
        The commit's address.

    Raises:
        UsageError: the id is malformed, or huggingface_hub is missing.
        BundleError: the bundle is damaged.
        ResourceError: the hub refuses or cannot be reached.
    """
    if not HUB_ID.fullmatch(repository):
        raise UsageError(f"{repository!r} is no hub id", "Write user/bundle")
    hub = require_hub()
    verify_bundle(folder)
    bundle = open_bundle(folder)
    card = model_card(bundle, repository, license_id, base_model)
    names = [*bundle.manifest.files, MANIFEST]
    names += [SIGNATURE] if bundle.path(SIGNATURE).is_file() else []
    operations = [hub.CommitOperationAdd(CARD, card.encode())]
    operations += [hub.CommitOperationAdd(name, str(bundle.path(name))) for name in sorted(names)]
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Upload the bundle")
    except Exception as error:  # of httpx, of huggingface_hub
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"{repository} cannot be written on the hub ({reason})",
            "Check the name, the network, and that HF_TOKEN may write",
        ) from error
    return str(commit.commit_url)


def model_card(
    bundle: Bundle, repository: str, license_id: str | None, base_model: str | None
) -> str:
    """The README of the repository: what is in the bundle, how good it is, how to use it."""
    manifest, report = bundle.manifest, bundle.report()
    backbone = manifest.backbone
    labels = manifest.router.settings.labels if manifest.router else ()
    header: dict[str, Any] = {"license": license_id, "base_model": base_model}
    lines = ["---", "library_name: dlp-edge", "pipeline_tag: text-generation"]
    lines += [f"{key}: {value}" for key, value in header.items() if value]
    lines += ["tags:", "- lora", "- dlp-lora", "- onnx", "---", ""]
    lines += [
        f"# {repository.rpartition('/')[2]}",
        "",
        f"A [dlp-edge](https://pypi.org/project/dlp-edge/) bundle: {backbone.name} in "
        f"{backbone.quantisation} for {manifest.target}, with {len(manifest.adapters)} LoRA "
        "adapters that a router picks and fuses at every sentence.",
        "",
        "```python",
        "from dlp_edge import Runtime",
        "",
        f'with Runtime.from_hub("{repository}") as rt:',
        '    print(rt.generate("...").text)',
        "```",
        "",
        "| adapter | rank | matrices | picked by |",
        "|---|---|---|---|",
    ]
    for adapter in manifest.adapters:
        targets = ", ".join(target.rpartition(".")[2] for target in adapter.target_modules)
        picked = "the router" if adapter.name in labels else "the application"
        lines.append(f"| {adapter.name} | {adapter.rank} | {targets} | {picked} |")
    size = sum(entry.size for entry in manifest.files.values())
    ratio, tokens = report["perplexity"]["ratio"], report["perplexity"]["tokens"]
    quality = f"Perplexity is {ratio:.3f} times the source's ({tokens} tokens)."
    lines += ["", f"{size / 1e6:.0f} MB. {quality}", ""]
    return "\n".join(lines)
