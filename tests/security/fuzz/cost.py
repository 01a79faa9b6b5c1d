"""A fuzzer that maximises cost: python -m tests.security.fuzz.cost SECONDS [SEED [STATE]].

Chains of components of tokenizers, of steps of templates and of operators of graphs are mutated;
of each kind, the most expensive chain so far is kept and mutated on. Each chain is tried in a
process of its own with limits. A chain that is accepted and takes more than the limits, or that
kills the process, is printed, and the fuzzer exits with 1. STATE is a file from which a later run
goes on, and which holds what was found.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dlp_edge.errors import DlpEdgeError
from dlp_edge.untrusted.chat_template import ChatTemplate
from dlp_edge.untrusted.tokenizer_file import load_tokenizer
from tests.security.fuzz import graph_chains
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


# How to try a chain, with the megabytes that it may take in addition; and how to make a link.
_Try = Callable[[list[Any]], tuple[Callable[[], object], int]]
_KINDS: dict[str, tuple[_Try, Callable[[random.Random], Any]]] = {
    "tokenizer": (lambda chain: (lambda: _tokenize(chain), 0), _component),
    "template": (lambda chain: (lambda: _render(chain), 0), lambda rng: rng.choice(_STEPS)),
    **{
        kind: (
            partial(graph_chains.prepared, kind),
            partial(graph_chains.step, operators=graph_chains.operators_of(kind)),
        )
        for kind in graph_chains.KINDS
    },
}


def measure(call: Callable[[], object], allowed: int) -> tuple[float, int]:
    """CPU seconds, and megabytes of the peak above the start and what is allowed."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    baseline, begun = _kilobytes("VmRSS"), time.process_time()
    call()
    return time.process_time() - begun, ((_kilobytes("VmHWM") - baseline) >> 10) - allowed


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


class _Search:
    """The most expensive chain of each kind so far, and what was found; kept in a file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.best: dict[str, tuple[float, list[Any]]] = {kind: (0.0, []) for kind in _KINDS}
        self.worst = dict.fromkeys(_KINDS, (0.0, 0))
        self.tried = dict.fromkeys(_KINDS, 0)
        self.seconds = 0.0
        self.found: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.__dict__.update(json.loads(path.read_text()))

    def save(self) -> None:
        if self._path is not None:
            kept = {name: value for name, value in vars(self).items() if name != "_path"}
            self._path.write_text(json.dumps(kept))

    def try_one(self, kind: str, rng: random.Random) -> None:
        prepare, make = _KINDS[kind]
        fresh = rng.random() < 0.2
        chain = _mutated(rng, [] if fresh else self.best[kind][1], make)
        took, memory, died = graph_chains.in_child(lambda: measure(*prepare(chain)))
        self.tried[kind] += 1
        self.worst[kind] = (max(self.worst[kind][0], took), max(self.worst[kind][1], memory))
        cost = took / MAX_SECONDS + memory / MAX_MEGABYTES
        if cost >= self.best[kind][0] * (0.99 if fresh else 1):
            self.best[kind] = (cost, chain)
        if took > MAX_SECONDS or memory > MAX_MEGABYTES or died:
            self.found.append({"kind": kind, "took": took, "memory": memory, "chain": chain})
            print(f"{kind}: {took:.1f} s, {memory} MB {died}: {chain!r}"[:4_000], flush=True)
            self.best[kind] = (0.0, [])


def run(seconds: float, seed: int, state: Path | None = None) -> int:
    """Fuzzes for a time; returns the number of chains over the limits."""
    rng, search = random.Random(seed), _Search(state)
    begun = time.monotonic()
    before, saved = search.seconds, begun
    while time.monotonic() - begun < seconds:
        for kind in _KINDS:
            search.try_one(kind, rng)
        search.seconds = before + time.monotonic() - begun
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            search.save()
    search.save()
    found = len(search.found)
    print(f"{sum(search.tried.values())} chains {search.tried} in {search.seconds:.0f} s; ", end="")
    print(f"most seconds and megabytes: {search.worst}; over the limits: {found}")
    return found


if __name__ == "__main__":
    number = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    sys.exit(bool(run(float(sys.argv[1]), number, Path(sys.argv[3]) if sys.argv[3:] else None)))
