"""Both cache policies on a real backbone, token for token against PEFT.

    python -m benchmarks.policies --backbone DIR --adapter NAME=DIR --adapter NAME=DIR

Exports an fp32 bundle, writes 1,000 tokens under a scripted sequence of fusions with `keep` and
with `recompute`, and lets PEFT models that do the same judge each token. Takes minutes: PEFT
needs about 60 ms a token.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.files import BACKBONE
from dlp_edge.export.pipeline import export_bundle
from dlp_edge.export.report import HELDOUT
from dlp_edge.runtime.decoding.engine import make_engine
from dlp_edge.runtime.decoding.sampling import make_sampler
from dlp_edge.runtime.engine.backbone import open_backbone
from dlp_edge.runtime.engine.device import choose_device
from tests.testing.oracle import Peft
from tests.testing.scripted_answer import ScriptedAnswer, by_peft, by_the_loop, script_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--adapter", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--tokens", type=int, default=1000)
    args = parser.parse_args()
    adapters = {name: Path(folder) for name, folder in (a.split("=", 1) for a in args.adapter)}
    with tempfile.TemporaryDirectory() as scratch:
        bundle_folder = Path(scratch) / "bundle"
        export_bundle(str(args.backbone), adapters, None, bundle_folder, "fp32")
        bundle = open_bundle(bundle_folder)
        device = choose_device("cpu", "cpu", None)
        graph = open_backbone(bundle.path(BACKBONE), bundle.manifest.backbone, device)
        tokenizer = bundle.tokenizer("tokenizer.json")
        prompt = tokenizer.encode(HELDOUT.read_text(encoding="utf-8")).ids[:60]
        engine = make_engine(graph, bundle.adapters(), args.tokens + len(prompt))
        oracle = Peft(args.backbone, adapters)
        script = script_of(list(adapters), args.tokens)
        for kv in ("keep", "recompute"):
            sampler = make_sampler(1.0, 1.0, 0, 0)
            answer = ScriptedAnswer(prompt, script, args.tokens, kv, sampler)  # type: ignore[arg-type]
            by_the_loop(engine, answer)
            expected = by_peft(oracle, answer)
            pairs = zip(answer.logits, expected, strict=True)
            equal = sum(int(ours.argmax() == pefts.argmax()) for ours, pefts in pairs)
            difference = np.abs(np.stack(answer.logits) - np.stack(expected)).max()
            print(
                f"{kv:9}  {len(script) - 1} changes of fusion, same most probable token at "
                f"{equal} of {args.tokens}, logits differ by {difference:.2g} at most"
            )


if __name__ == "__main__":
    main()
