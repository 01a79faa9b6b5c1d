"""Every backbone family in every format, against transformers + PEFT: one table.

    python -m benchmarks.exactness [--family NAME ...] [--quant FORMAT ...]

Makes tiny random models, adds random PEFT adapters, exports them, and prints for base model and
fusion the largest |difference| of the logits over 200 tokens and the share of positions with the
same most probable token, as the export's own report has them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from dlp_edge.export.backbone import FORMATS
from dlp_edge.export.pipeline import export_bundle
from dlp_edge.export.suppress_output import suppress_output
from tests.testing.families import FAMILIES, make_adapter, make_backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--quant", action="append", choices=FORMATS["cpu"])
    args = parser.parse_args()
    cells = [(f, q) for f in args.family or FAMILIES for q in args.quant or FORMATS["cpu"]]
    print(
        f"{'family':18}{'format':8}{'base: max':>12}{'greedy':>8}{'fusion: max':>14}{'greedy':>8}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for family, quantisation in tqdm(cells, leave=False, disable=not sys.stderr.isatty()):
            print(row(Path(scratch), family, quantisation))


def row(scratch: Path, family: str, quantisation: str) -> str:
    folder = scratch / family
    if not folder.exists():
        with suppress_output():
            make_backbone(family, folder / "backbone")
            for name, rank in (("one", 4), ("two", 8)):
                targets = "all-linear" if name == "one" else ["q_proj", "v_proj"]
                make_adapter(folder / "backbone", folder / name, r=rank, target_modules=targets)
    adapters = {name: folder / name for name in ("one", "two")}
    out = folder / quantisation
    parity = export_bundle(str(folder / "backbone"), adapters, None, out, quantisation)["parity"]
    cells = [
        f"{parity[kind]['max_abs_difference']:12.2g}  {parity[kind]['greedy_agreement']:6.1%}"
        for kind in ("base", "fusion")
    ]
    return f"{family:18}{quantisation:8}{'  '.join(cells)}"


if __name__ == "__main__":
    main()
