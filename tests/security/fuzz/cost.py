"""A fuzzer that maximises cost: python -m tests.security.fuzz.cost SECONDS [SEED].

Chains of components of tokenizers and of steps of templates are mutated; of each kind, the most
expensive chain so far is kept and mutated on. A chain that is accepted and takes more than the
limits is printed, and the process exits with 1.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlp_edge.errors import DlpEdgeError
from dlp_edge.untrusted.chat_template import ChatTemplate
from dlp_edge.untrusted.tokenizer_file import load_tokenizer
from tests.testing.paths import TINY

MAX_SECONDS = 5.0
MAX_MEGABYTES = 200
TEXTS = ("a" * 4_096, "\ufdfa " * 2_048, "a\u0130b " * 1_024, " " * 4_096, "\n a" * 1_365)

_TEXT = "{% set n.a = n.a + n.a %}"
_STEPS = (
    _TEXT, _TEXT, "{% set n.l = n.l + n.l %}", "{% set n.l = [n.l, n.l] %}",
    "{% set n.l = n.l + [n.a] %}", "{% set n.a = n.a|upper %}", "{% set n.a = n.a ~ n.l %}",
    "{% set n.l = n.a.split('a') %}", "{% set n.a = n.l|join(n.a[:9]) %}",
    "{% set n.a = n.a.replace('a', 'ba') %}", "{% set n.a = n.a|tojson %}", "{{ n.l|tojson }}",
    "{% set n.l = n.l|sort %}", "{% set n.l = n.l|unique|list %}", "{% set n.l = n.l|list %}",
    "{{ n.a }}", "{{ n.l }}", "{{ n.l == n.l }}", "{{ n.a in n.l }}", "{{ n.l|max }}",
    "{% for i in range(99) %}", "{% for i in n.l %}", "{% endfor %}", "{{ n.a.rfind(n.a[1:]) }}",
    "{% set n.a = n.a[1:] %}", "{{ n.a.strip(n.a) }}", "{% set n.a = n.a|e %}",
    "{% set n.l = {'k': n.l}.values()|list %}", "{{ n.l|map('upper')|list|length }}",
    "{{ n.l|tojson(indent=8) }}", "{% set n.a = n.a|string|title %}", "{{ n.a.count('a') }}",
)  # fmt: skip
_CONTENTS = ("", "a", "aa", "\ufdfa" * 3, "\u0130\u4e16", "\U0001f600" * 8, "x" * 60)
_ATOMS = (
    "a", " ", ".", r"\s", r"\S", "[^b]", "[ab]", r"\p{L}", "*", "+", "?", "{2,}", "{1,9}", "|",
    "(?:", ")", "(?=", "(?!", "(?<=", "(?i:", "$", "^", "b", "*+", "+?",
)  # fmt: skip


def _component(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(
        ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Replace", "Prepend", "ByteLevel", "Regex"]
    )
    if kind == "Prepend":
        return {"type": kind, "prepend": rng.choice(_CONTENTS)}
    if kind == "Regex":
        pattern = "".join(rng.choice(_ATOMS) for _ in range(rng.randint(1, 9)))
        return {"type": "Replace", "pattern": {"Regex": pattern}, "content": rng.choice(_CONTENTS)}
    if kind == "Replace":
        return {
            "type": kind,
            "pattern": {"String": rng.choice(_CONTENTS[:3])},
            "content": rng.choice(_CONTENTS),
        }
    return {"type": kind}


def _tokenize(chain: list[Any]) -> None:
    document = json.loads((TINY / "bundle" / "tokenizer.json").read_bytes())
    document["normalizer"] = {"type": "Sequence", "normalizers": chain}
    try:
        tokenizer = load_tokenizer(json.dumps(document).encode())
    except ValueError:
        return
    for text in TEXTS:
        with contextlib.suppress(DlpEdgeError):
            tokenizer.encode(text)


def _render(chain: list[Any]) -> None:
    start = "{% set n = namespace(a='a\u0130' * 1, l=['a']) %}".replace(" * 1", "")
    with contextlib.suppress(DlpEdgeError):
        ChatTemplate(start + "".join(chain)).render([{"role": "user", "content": "a b " * 4_000}])


_KINDS: dict[str, tuple[Callable[[list[Any]], None], Callable[[random.Random], Any]]] = {
    "tokenizer": (_tokenize, _component),
    "template": (_render, lambda rng: rng.choice(_STEPS)),
}


def measure(call: Callable[[list[Any]], None], chain: list[Any]) -> tuple[float, int]:
    """CPU seconds, and megabytes of the peak above the start."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    baseline, begun = _kilobytes("VmRSS"), time.process_time()
    call(chain)
    return time.process_time() - begun, (_kilobytes("VmHWM") - baseline) >> 10


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _mutated(rng: random.Random, chain: list[Any], make: Callable[[random.Random], Any]) -> Any:
    new = list(chain)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(new))
        action = rng.random()
        if action < 0.5 or not new:
            new.insert(at, make(rng))
        elif action < 0.7:
            del new[at - 1]
        else:
            part = new[at - 1 : at + 3]
            new[at:at] = part * rng.randint(1, 4)
    return new[:200]


def run(seconds: float, seed: int) -> int:
    """Fuzzes for a time; returns the number of chains over the limits."""
    rng, found, tried = random.Random(seed), 0, 0
    best: dict[str, tuple[float, list[Any]]] = {kind: (0.0, []) for kind in _KINDS}
    worst = dict.fromkeys(_KINDS, (0.0, 0))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for kind, (call, make) in _KINDS.items():
            fresh = rng.random() < 0.2
            chain = _mutated(rng, [] if fresh else best[kind][1], make)
            took, memory = measure(call, chain)
            tried += 1
            worst[kind] = (max(worst[kind][0], took), max(worst[kind][1], memory))
            cost = took / MAX_SECONDS + memory / MAX_MEGABYTES
            if cost >= best[kind][0] * (0.99 if fresh else 1):
                best[kind] = (cost, chain)
            if took > MAX_SECONDS or memory > MAX_MEGABYTES:
                found += 1
                print(f"{kind}: {took:.1f} s, {memory} MB: {chain!r}"[:4_000], flush=True)
                best[kind] = (0.0, [])
    print(f"{tried} chains; most seconds and megabytes: {worst}; over the limits: {found}")
    return found


if __name__ == "__main__":
    number = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    sys.exit(bool(run(float(sys.argv[1]), number)))
