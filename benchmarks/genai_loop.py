"""dlp-edge beside onnxruntime-genai's own loop: the same weights, prompt and lengths, in one run.

    python benchmarks/genai_loop.py BUNDLE --backbone FILE.gguf --adapters sums=0.6,sql=0.4

Builds the weights once more, in the same precision, for onnxruntime-genai (its graph has other
inputs), then lets three processes take turns: dlp-edge with the base model, dlp-edge with the
adapters fused, and onnxruntime-genai with the base model. Prints medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dlp_edge.bundle import open_bundle
from dlp_edge.cli.options import parse_adapters
from dlp_edge.export.backbone import build_graph
from dlp_edge.export.report import HELDOUT
from dlp_edge.export.source import load_source

# The builder's format that comes nearest to ours, and its options. Its int4 is another one.
BUILDER: dict[str, tuple[str, dict[str, str]]] = {
    "int8": ("int8", {}),
    "int4": ("int4", {"algo_config": "k_quant_mixed"}),
    "fp32": ("fp32", {}),
}
Rates = dict[str, float]


def measure_dlp(bundle: Path, adapters: str, text: str, new_tokens: int) -> Rates:
    """Rates of a whole `Runtime.generate`, as `dlp-edge run` shows them."""
    from dlp_edge import Runtime

    options = {"adapters": parse_adapters(adapters), "max_new_tokens": new_tokens + 1}
    with Runtime(bundle, max_context=2048) as runtime:
        runtime.generate(text, **options)  # warm up
        reply = runtime.generate(text, **options)
    return {
        "prefill": reply.prefill_rate,
        "decode": reply.timings.decode_rate,
        "tokens": reply.usage.completion_tokens,
    }


def measure_genai(folder: Path, ids: list[int], new_tokens: int) -> Rates:
    """Rates of onnxruntime-genai's generator: prefill, then greedy steps."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))

    def generate() -> Rates:
        parameters = og.GeneratorParams(model)
        length = len(ids) + new_tokens + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        begun = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        prefilled = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        done = time.perf_counter()
        return {
            "prefill": len(ids) / (prefilled - begun),
            "decode": new_tokens / (done - prefilled),
            "tokens": new_tokens + 1,
        }

    generate()  # warm up
    return generate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--adapters", required=True, help="two to fuse: a=0.6,b=0.4")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", choices=("base", "fused", "genai"), help=argparse.SUPPRESS)
    parser.add_argument("--genai", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_work(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        with load_source(arguments.backbone) as source:
            quantisation = open_bundle(arguments.bundle).manifest.backbone.quantisation
            precision, options = BUILDER[quantisation]
            options = {**options, "prune_lm_head": "true"}
            build_graph(source.folder, precision, "cpu", Path(folder), options)
        found: dict[str, list[Rates]] = {"base": [], "fused": [], "genai": []}
        for round_number in range(arguments.rounds):
            for worker, rates in found.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--worker", worker]
                done = subprocess.run(
                    [*command, "--genai", folder], capture_output=True, text=True, check=True
                )
                rates.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {round_number + 1}/{arguments.rounds}", file=sys.stderr)
    _print_table(found)


def _work(arguments: argparse.Namespace) -> Rates:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.bundle / "tokenizer.json"))
    ids = tokenizer.encode(HELDOUT.read_text(encoding="utf-8")).ids[: arguments.prompt_tokens]
    if arguments.worker == "genai":
        return measure_genai(arguments.genai, ids, arguments.new_tokens)
    adapters = arguments.adapters if arguments.worker == "fused" else ""
    return measure_dlp(arguments.bundle, adapters, tokenizer.decode(ids), arguments.new_tokens)


def _print_table(found: dict[str, list[Rates]]) -> None:
    print("| engine | prefill tokens/s | decode tokens/s | new tokens | decode / genai, by round |")
    print("|---|---|---|---|---|")
    for worker, rates in found.items():
        ratios = [
            mine["decode"] / theirs["decode"]
            for mine, theirs in zip(rates, found["genai"], strict=True)
        ]
        prefill = statistics.median(rate["prefill"] for rate in rates)
        decode = statistics.median(rate["decode"] for rate in rates)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        tokens = statistics.median(rate["tokens"] for rate in rates)
        print(f"| {worker} | {prefill:.0f} | {decode:.1f} | {tokens:.0f} | {spread} |")


if __name__ == "__main__":
    main()
