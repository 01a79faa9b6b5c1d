"""Where things are in a checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
KEPT = DATA / "bundle-v2"  # a tiny bundle, as an earlier version wrote it
TINY = DATA / "tiny"  # the bundle and adapters of the fast tier
BYTES_TOKENIZER = DATA / "bytes.json"
