"""Makes `tests/data/tiny`, the bundles and adapters of the tests that run without torch: run it
again when the bundle format changes.

    python -m tests.testing.make_tiny_bundle
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dlp_edge.export.pipeline import export_bundle
from dlp_edge.models.networks import router_mlp
from dlp_edge.models.training import train_router
from tests.testing.make_kept_bundle import forget_path
from tests.testing.paths import TINY
from tests.testing.tiny import (
    make_parrot,
    make_tiny_adapters,
    make_tiny_backbone,
    make_tiny_tasks,
)


def main() -> None:
    router_mlp.EMBEDDING = 32
    router_mlp.BASE |= {"hidden_1": 64}
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        backbone = make_tiny_backbone(here / "tiny-llama")
        adapters = make_tiny_adapters(backbone, here)
        folders = [*adapters.values(), make_parrot(backbone, here)]
        for folder in folders:
            forget_path(folder / "adapter_config.json")
        train_router(make_tiny_tasks(here / "tasks"), here / "router")
        shutil.rmtree(TINY, ignore_errors=True)
        TINY.mkdir()
        export_bundle(str(backbone), adapters, here / "router", TINY / "bundle", "fp32")
        export_bundle(str(backbone), adapters, here / "router", TINY / "int8", "int8")
        export_bundle(str(backbone), adapters, None, TINY / "int4", "int4")
        for folder in folders:
            (TINY / folder.name).mkdir()
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(folder / name, TINY / folder.name / name)


if __name__ == "__main__":
    main()
