"""Makes what the stages serve: the demo's skills as an export for vLLM, and as an fp32 bundle.

python -m tests.scale.demo_folders FOLDER [GGUF]
"""

from __future__ import annotations

import sys
from pathlib import Path

from dlp_edge.demo.demo import HERE, fetch_backbone

EXPORT, BUNDLE = "export", "bundle-fp32"


def tell(step: str, fraction: float) -> None:
    print(f"{fraction:4.0%}  {step}", file=sys.stderr)


def main() -> None:
    from dlp_edge.export.pipeline import export_bundle
    from dlp_edge.export.vllm.pipeline import export_for_vllm

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    gguf = Path(sys.argv[2]) if len(sys.argv) > 2 else fetch_backbone(tell)
    skills = {path.name: path for path in sorted((HERE / "adapters").iterdir()) if path.is_dir()}
    template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    if not (folder / EXPORT).is_dir():
        export_for_vllm(str(gguf), skills, HERE / "router", folder / EXPORT, template, tell)
    if not (folder / BUNDLE).is_dir():
        export_bundle(
            str(gguf),
            skills,
            HERE / "router",
            folder / BUNDLE,
            quantisation="fp32",
            chat_template=template,
            on_progress=tell,
            fast=True,
        )


if __name__ == "__main__":
    main()
