"""Attacks by PEFT adapters: a folder with a configuration and weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.security.attacks.forge import Attack
from tests.security.attacks.tensors import CHANGES, Change, valued

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _weights(change: Change) -> Attack:
    def attack(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return attack


def _config(change: Callable[[dict[str, Any]], object]) -> Attack:
    def attack(folder: Path) -> None:
        document = json.loads((folder / CONFIG).read_text())
        change(document)
        (folder / CONFIG).write_text(json.dumps(document))

    return attack


def _text(content: bytes) -> Attack:
    return lambda folder: (folder / CONFIG).write_bytes(content) and None


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.")


def _link(name: str, to: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return attack


def _pipe(name: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return attack


def _sparse(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 1 << 40)


def _first(tensors: dict[str, np.ndarray], array: np.ndarray) -> None:
    tensors[next(iter(tensors))] = array


ATTACKS: dict[str, Attack] = {
    **{
        f"weights: {name}": _weights(change)
        for name, change in CHANGES.items()
        if name != "metadata of numbers"
    },
    "config: 30,000 ranks": _config(
        lambda c: c.update(rank_pattern={f"x{i}.*": 4 for i in range(30_000)})
    ),
    "config: 1,000 ranks that backtrack": _config(
        lambda c: c.update(rank_pattern={f".*.*x{i}": 4 for i in range(1_000)})
    ),
    "weights: beyond half precision": _weights(
        valued(lambda t: next(iter(t.values())).__setitem__((0, 0), 70_000))
    ),
    "weights: NaN": _weights(valued(lambda t: next(iter(t.values())).__setitem__((0, 0), np.nan))),
    "weights: half a pair": _weights(valued(lambda t: t.pop(next(iter(t))))),
    "weights: a vector": _weights(valued(lambda t: _first(t, np.zeros(4, np.float32)))),
    "weights: another width": _weights(valued(lambda t: _first(t, np.zeros((4, 9), np.float32)))),
    "weights: integers": _weights(valued(lambda t: _first(t, np.zeros((4, 64), np.int64)))),
    "weights: a strange name": _weights(
        valued(lambda t: t.update({"../../x": np.zeros((1, 1), np.float32)}))
    ),
    "weights: no tensor": _weights(valued(lambda t: t.clear())),
    "weights: a terabyte of nothing": _sparse,
    "weights: missing": lambda folder: (folder / WEIGHTS).unlink(),
    "weights: a pickle": _pickle,
    "config: missing": lambda folder: (folder / CONFIG).unlink(),
    "config: empty": _text(b""),
    "config: a list": _text(b"[]"),
    "config: nested": _text(b"[" * 1_000_000),
    "config: NaN": _text(b'{"peft_type": "LORA", "r": NaN}'),
    "config: twice": _text(b'{"peft_type": "LORA", "peft_type": "LORA"}'),
    "config: too large": _text(b" " * (2 << 20)),
    "config: another kind": _config(lambda c: c.update(peft_type="PROMPT_TUNING")),
    "config: rank huge": _config(lambda c: c.update(r=10**30)),
    "config: rank is a text": _config(lambda c: c.update(r="4")),
    "config: rank is true": _config(lambda c: c.update(r=True)),
    "config: alpha huge": _config(lambda c: c.update(lora_alpha=1e30)),
    "config: alpha beyond floats": _config(lambda c: c.update(lora_alpha=10**400)),
    "config: alpha is a list": _config(lambda c: c.update(lora_alpha=[])),
    "config: patterns are a list": _config(lambda c: c.update(rank_pattern=["x"])),
    "config: a pattern that backtracks": _config(
        lambda c: c.update(alpha_pattern={"(([a-z._0-9])+)+!": 1})
    ),
    "config: a pattern that is none": _config(lambda c: c.update(alpha_pattern={"(": 1})),
    "config: the base model is a list": _config(lambda c: c.update(base_model_name_or_path=["x"])),
    "config: DoRA": _config(lambda c: c.update(use_dora=True)),
}
if hasattr(os, "mkfifo"):
    ATTACKS |= {
        "weights: a link": _link(WEIGHTS, "/etc/passwd"),
        "weights: a device": _link(WEIGHTS, "/dev/zero"),
        "weights: a pipe": _pipe(WEIGHTS),
        "config: a link": _link(CONFIG, "/etc/passwd"),
        "config: a pipe": _pipe(CONFIG),
    }
