"""Makes `tests/data/bundle-v<VERSION>` and its recorded answers: run it once for each version of
the bundle format, and keep what it made for good.

    python -m tests.testing.make_kept_bundle
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

from dlp_edge.bundle.manifest import VERSION
from dlp_edge.export.pipeline import export_bundle
from dlp_edge.models import training
from dlp_edge.models.networks import router_mlp
from tests.testing.families import make_adapter, make_backbone
from tests.testing.kept_bundle import answers
from tests.testing.paths import DATA

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        backbone = make_backbone("llama2", here / "tiny", **SMALL, num_key_value_heads=1)
        adapters = {
            "count": make_adapter(backbone, here / "count", r=2, target_modules=["q_proj"]),
            "greet": make_adapter(backbone, here / "greet", r=3, target_modules="all-linear"),
        }
        for folder in adapters.values():
            forget_path(folder / "adapter_config.json")
        router_mlp.EMBEDDING = 16
        router_mlp.BASE = {**router_mlp.BASE, "hidden_1": 32}
        router = here / "router"
        training.train_router(tasks(here / "tasks"), router)
        out = DATA / f"bundle-v{VERSION}"
        export_bundle(str(backbone), adapters, router, out, "fp32")
        expected = json.dumps(answers(out), indent=1)
        (DATA / f"bundle-v{VERSION}.answers.json").write_text(expected + "\n", encoding="utf-8")


def forget_path(path: Path) -> None:
    """PEFT writes where the backbone was, a path of the machine."""
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": "tiny"}), encoding="utf-8")


def tasks(folder: Path) -> Path:
    chance = random.Random(0)
    for name, line in (("count", "Count {} and {}"), ("greet", "Greet guest {} of {}")):
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 60), ("dev", 20)):
            samples = [
                {"prompt": line.format(*chance.sample(range(99), 2)), "response": "So it is done."}
                for _ in range(count)
            ]
            text = "".join(json.dumps(sample) + "\n" for sample in samples)
            (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
