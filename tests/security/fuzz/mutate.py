"""Mutations that know the formats: a value of a JSON document changes, a safetensors header with
its length put right, bytes of a graph where they are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.security.fuzz.targets import PARTS

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 53, 1 << 63, 1 << 64, -(1 << 63), 10**40),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", " ", "\x00", "\ud800", "é" * 9),
    *("../x", "C:x", "CON", "a/b", "{{ x }}", "{% for x in y %}", "(a+)+$", "x" * 70_000),
    *([], {}, [[]], [None], {"": 0}, [0] * 1000),
)


def mutator(target: str, seeds: Sequence[bytes]) -> Callable[[bytes, int, int], bytes]:
    """libFuzzer's custom mutator for a target. Now and then it begins again from a seed: good
    bundles all look the same to libFuzzer, so it keeps only one of them."""

    def change(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.1:
            data = chance.choice(seeds)
        for _ in range(chance.choice((1, 1, 2, 5))):
            data = _one_change(target, data, chance)
        return data[:most]

    return change


def _one_change(target: str, data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.6 and len(data) > 3:
        try:
            return _change(target, data, chance)
        except (ValueError, RecursionError, TypeError):
            pass  # what the format was has been lost on the way
    return _havoc(data, chance)


def _change(target: str, data: bytes, chance: random.Random) -> bytes:
    if target in ("bundle", "runtime"):
        name = PARTS[data[0] % len(PARTS)]
        if name.endswith(".json"):
            return data[:1] + _json(data[1:], chance)
        if name.endswith(".safetensors"):
            return data[:1] + _safetensors(data[1:], chance)
        return data[:1] + _bytes(data[1:], chance)
    if target == "peft":
        length = int.from_bytes(data[:2], "little")
        config, weights = data[2 : 2 + length], data[2 + length :]
        if chance.random() < 0.5:
            config = _json(config, chance)[:65_535]
        else:
            weights = _safetensors(weights, chance)
        return len(config).to_bytes(2, "little") + config + weights
    if target == "samples":
        lines = data.split(b"\n")
        at = chance.randrange(len(lines))
        lines[at] = _json(lines[at], chance)
        return b"\n".join(lines)
    return _json(data, chance)


def _havoc(data: bytes, chance: random.Random) -> bytes:
    """Bytes taken out, put in, doubled or exchanged."""
    at, size = chance.randint(0, len(data)), chance.choice((1, 1, 2, 4, 8, 64, 1000))
    what = chance.randrange(4)
    if what == 0:
        return data[:at] + data[at + size :]
    if what == 1:
        return data[:at] + chance.randbytes(size) + data[at:]
    if what == 2:
        other = chance.randint(0, len(data))
        return data[:at] + data[other : other + size] + data[at:]
    return _bytes(data, chance) if data else chance.randbytes(size)


def _bytes(data: bytes, chance: random.Random) -> bytes:
    """Some bytes exchanged where they are, so that the lengths around them stay right."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        changed[chance.randrange(len(changed))] = (
            chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            if (chance.random() < 0.5)
            else chance.randrange(256)
        )
    return bytes(changed)


def _safetensors(data: bytes, chance: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if chance.random() < 0.2:
        return data[: 8 + length] + _bytes(rest, chance)
    header = _json(header, chance)
    return len(header).to_bytes(8, "little") + header + rest


def _json(data: bytes, chance: random.Random) -> bytes:
    """One value of a document changed, removed, doubled or moved."""
    document = json.loads(data)
    places = list(_places(document))
    if not places:
        return json.dumps(chance.choice(_ODD)).encode()
    holder, key = chance.choice(places)
    what = chance.randrange(5)
    if what == 0:
        holder[key] = chance.choice(_ODD)
    elif what == 1:
        holder[key] = _near(holder[key], chance)
    elif what == 2:
        del holder[key]
    elif what == 3:
        other, at = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[at]))
    elif isinstance(holder, dict):
        holder[str(chance.choice(_ODD))[:99]] = holder[key]
    else:
        holder.append(holder[key])
    return json.dumps(document).encode()


def _near(value: Any, chance: random.Random) -> Any:
    """A value of the same kind, a little off."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + chance.choice((-1, 1, value, -2 * value, 0.5))
    if isinstance(value, str):
        at = chance.randint(0, len(value))
        return value[:at] + chance.choice(("", "x", "\x00", "{{", "\\", '"', "(")) + value[at + 1 :]
    return value


def _places(document: Any) -> Any:
    """(holder, key) of every value."""
    waiting = [document] if isinstance(document, (dict, list)) else []
    while waiting:
        holder = waiting.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])
