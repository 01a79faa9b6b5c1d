"""Attacks by the manifest and by what lies in the folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.security.attacks.forge import Attack, Document, edited

HUGE = 10**30

_EDITS: dict[str, Callable[[Document], object]] = {
    "another format": lambda m: m.update(format="zip"),
    "format of another type": lambda m: m.update(format=["dlp-edge-bundle"]),
    "version 0": lambda m: m.update(version=0),
    "version of a later release": lambda m: m.update(version=99),
    "version is a float": lambda m: m.update(version=2.0),
    "version is true": lambda m: m.update(version=True),
    "version is huge": lambda m: m.update(version=HUGE),
    "unknown field": lambda m: m.update(extra=1),
    "unknown field inside": lambda m: m["backbone"].update(extra=1),
    "missing field": lambda m: m.pop("target"),
    "missing field inside": lambda m: m["backbone"].pop("dtype"),
    "edition negative": lambda m: m.update(edition=-1),
    "edition huge": lambda m: m.update(edition=HUGE),
    "edition of no file": lambda m: m.update(edition=7),
    "created_with very long": lambda m: m.update(created_with="x" * 100_000),
    "unknown target": lambda m: m.update(target="rm -rf"),
    "files is a list": lambda m: m.update(files=[]),
    "adapters is an object": lambda m: m.update(adapters={}),
    "adapter twice": lambda m: m["adapters"].append(m["adapters"][0]),
    "adapter with a path for a name": lambda m: m["adapters"][0].update(name="../../x"),
    "adapter rank 0": lambda m: m["adapters"][0].update(rank=0),
    "adapter rank huge": lambda m: m["adapters"][0].update(rank=HUGE),
    "adapter rank not its own": lambda m: m["adapters"][0].update(rank=17),
    "adapter left out": lambda m: m["adapters"].pop(),
    "adapter hash is none": lambda m: m["adapters"][0].update(sha256="x"),
    "target modules is a text": lambda m: m["adapters"][0].update(target_modules="q_proj"),
    "router label of no adapter": lambda m: m["router"]["settings"]["labels"].append("x"),
    "router label twice": lambda m: m["router"]["settings"]["labels"].append("sql"),
    "router without labels of its rows": lambda m: m["router"]["settings"]["labels"].extend(
        ["sums"] * 100
    ),
    "router of an unknown kind": lambda m: m["router"].update(architecture="pickle"),
    "router reads nothing": lambda m: m["router"]["settings"].update(prompt_tokens=0),
    "router reads everything": lambda m: m["router"]["settings"].update(prompt_tokens=HUGE),
    "router temperature 0": lambda m: m["router"]["settings"].update(temperature=0.0),
    "router temperature negative": lambda m: m["router"]["settings"].update(temperature=-1.0),
    "router temperature tiny": lambda m: m["router"]["settings"].update(temperature=1e-300),
    "unknown selection": lambda m: m["router"]["selection"].update(select="best"),
    "selection p 2": lambda m: m["router"]["selection"].update(p=2.0),
    "selection k 0": lambda m: m["router"]["selection"].update(k=0),
    "selection confidence 9": lambda m: m["router"]["selection"].update(min_confidence=9.0),
    "selection k is a float": lambda m: m["router"]["selection"].update(k=1.5),
    "no router, but its files": lambda m: m.update(router=None),
    "slot twice": lambda m: m["backbone"]["slots"].append(m["backbone"]["slots"][0]),
    "slot of another name": lambda m: m["backbone"]["slots"][0].update(name="other"),
    "slot input 0": lambda m: m["backbone"]["slots"][0].update(input_size=0),
    "slot input huge": lambda m: m["backbone"]["slots"][0].update(input_size=HUGE),
    "slot input of another graph": lambda m: m["backbone"]["slots"][0].update(input_size=65),
    "slot output negative": lambda m: m["backbone"]["slots"][0].update(output_size=-1),
    "slot part outside": lambda m: m["backbone"]["slots"][0]["parts"][0].update(stop=10_000),
    "slot part negative": lambda m: m["backbone"]["slots"][0]["parts"][0].update(start=-4),
    "slot part backwards": lambda m: m["backbone"]["slots"][0]["parts"][0].update(start=9, stop=3),
    "slot parts overlap": lambda m: m["backbone"]["slots"][0]["parts"][1].update(start=0),
    "slot module twice": lambda m: m["backbone"]["slots"][0]["parts"].append(
        m["backbone"]["slots"][0]["parts"][0]
    ),
    "chat template of another type": lambda m: m.update(chat_template=["x"]),
    "chat template very long": lambda m: m.update(chat_template="x" * 1_000_000),
}

for _field in ("context_length", "vocab_size", "num_layers", "num_kv_heads", "head_size"):
    for _value in (0, -1, HUGE, 1.5, "1", True, None):
        _EDITS[f"{_field} is {str(_value)[:6]}"] = lambda m, field=_field, value=_value: m[
            "backbone"
        ].update({field: value})
for _field in ("num_layers", "num_kv_heads", "vocab_size"):
    _EDITS[f"{_field} of another graph"] = lambda m, field=_field: m["backbone"].update(
        {field: m["backbone"][field] + 1}
    )
for _field, _wrong in {
    "dtype": "float64",
    "quantisation": "int1",
    "eos_token_ids": [10**9],
    "eos_token": "x" * 100_000,
    "name": 7,
    "slots": "none",
}.items():
    _EDITS[f"backbone.{_field} is wrong"] = lambda m, field=_field, wrong=_wrong: m[
        "backbone"
    ].update({field: wrong})
_EDITS["dtype of another target"] = lambda m: m["backbone"].update(dtype="float16")


def _listed(name: str) -> Callable[[Document], object]:
    return lambda m: m["files"].update({name: m["files"]["report.json"]})


for _name in (
    "../report.json", "/etc/passwd", "a/b", "a\\b", "C:report.json", "report.json:stream", "CON",
    "nul.txt", "com1", "", ".", "..", "REPORT.JSON", "report.json ", "report.json.", "~", "*",
    "a\x00b", "\u202egpj.exe", "manifest.json", "x" * 5_000,
):  # fmt: skip
    _EDITS[f"lists {_name[:12]!r}"] = _listed(_name)
for _name in ("backbone.onnx", "backbone.onnx.data", "tokenizer.json", "router.onnx"):
    _EDITS[f"does not list {_name}"] = lambda m, name=_name: m["files"].pop(name)
for _what, _value in {
    "size negative": {"size": -1},
    "size huge": {"size": HUGE},
    "size too small": {"size": 1},
    "size is a text": {"size": "1"},
    "hash is none": {"sha256": ""},
    "hash in capitals": {"sha256": "A" * 64},
    "hash of another file": {"sha256": "0" * 64},
}.items():
    _EDITS[f"file {_what}"] = lambda m, value=_value: m["files"]["tokenizer.json"].update(value)


def _raw(change: Callable[[str], str | bytes]) -> Attack:
    def attack(folder: Path) -> None:
        path = folder / "manifest.json"
        found = change(path.read_text())
        path.write_bytes(found if isinstance(found, bytes) else found.encode())

    return attack


_RAW: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda t: "",
    "no object": lambda t: "[1]",
    "cut": lambda t: t[: len(t) // 2],
    "trailing text": lambda t: t + "{}",
    "no UTF-8": lambda t: b"\xff\xfe" + t.encode(),
    "zeros": lambda t: b"\0" * 10_000,
    "byte order mark": lambda t: "\ufeff" + t,
    "field twice": lambda t: t.replace('"target"', '"target": "cpu", "target"', 1),
    "version twice": lambda t: t.replace('"version"', '"version": 1, "version"', 1),
    "NaN": lambda t: t.replace('"temperature": ', '"temperature": NaN, "x": ', 1),
    "Infinity": lambda t: t.replace('"p": 0.6', '"p": Infinity', 1),
    "a float beyond floats": lambda t: t.replace('"p": 0.6', '"p": 1e999', 1),
    "a number of a million digits": lambda t: t.replace(
        '"version": 2', '"version": ' + "9" * 1_000_000, 1
    ),
    "half a surrogate": lambda t: t.replace('"cpu"', '"\\ud800"', 1),
    "comment": lambda t: "// hello\n" + t,
    "deep lists": lambda t: "[" * 1_000_000,
    "deep objects": lambda t: '{"a":' * 500_000,
    "deep inside": lambda t: t.replace('"cpu"', "[" * 100 + "]" * 100, 1),
    "too large": lambda t: t + " " * (2 << 20),
    "a million lists": lambda t: "[" + "[]," * 250_000 + "[]]",
    "a million objects": lambda t: "[" + "{}," * 250_000 + "{}]",
    "quotes without end": lambda t: '"\\"' * 300_000,
    "another template, old checksum": lambda t: t.replace("<|assistant|>", "<|assistent|>"),
}


def _remove(name: str) -> Attack:
    return lambda folder: (folder / name).unlink()


def _link(folder: Path) -> None:
    target = folder / "tokenizer.json"
    elsewhere = folder.parent / "elsewhere"
    target.rename(elsewhere)
    target.symlink_to(elsewhere)


def _linked_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    elsewhere = folder.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _made(name: str, make: Callable[[Path], Any]) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return attack


def _add(name: str) -> Attack:
    return lambda folder: (folder / name).write_bytes(b"x")


def _sparse(folder: Path) -> None:
    """A weight file of a terabyte that takes no room on the disk."""
    size = 1 << 40
    os.truncate(folder / "backbone.onnx.data", size)
    edited(lambda m: m["files"]["backbone.onnx.data"].update(size=size))(folder)


def _sparse_tokenizer(folder: Path) -> None:
    size = 1 << 36
    os.truncate(folder / "tokenizer.json", size)
    edited(lambda m: m["files"]["tokenizer.json"].update(size=size))(folder)


def _folder_attacks() -> dict[str, Attack]:
    found: dict[str, Attack] = {f"without {name}": _remove(name) for name in (
        "manifest.json", "backbone.onnx", "backbone.onnx.data", "adapters.safetensors",
        "tokenizer.json", "report.json", "router.onnx", "router_head.safetensors",
    )}  # fmt: skip
    for name in ("evil.so", "onnxruntime.dll", "Manifest.json", "backbone.onnx.bak", "config.json"):
        found[f"with {name} beside"] = _add(name)
    found["a folder beside"] = _made("inner", Path.mkdir)
    found["a folder for a file"] = _made("report.json", Path.mkdir)
    found["a folder for the manifest"] = _made("manifest.json", Path.mkdir)
    found["a cut file"] = lambda folder: os.truncate(folder / "backbone.onnx.data", 1000)
    found["a terabyte of nothing"] = _sparse
    found["a tokenizer of 64 GB"] = _sparse_tokenizer
    if hasattr(os, "mkfifo"):
        found["a pipe for a file"] = _made("tokenizer.json", os.mkfifo)
        found["a pipe for the manifest"] = _made("manifest.json", os.mkfifo)
        found["a device for a file"] = _made(
            "tokenizer.json", lambda path: path.symlink_to("/dev/zero")
        )
        found["a link for a file"] = _link
        found["a link for the manifest"] = _linked_manifest
        found["a link to itself"] = _made("tokenizer.json", lambda path: path.symlink_to(path))
    return found


ATTACKS: dict[str, Attack] = {
    **{f"manifest: {name}": edited(change) for name, change in _EDITS.items()},
    **{f"manifest text: {name}": _raw(change) for name, change in _RAW.items()},
    **{f"folder: {name}": attack for name, attack in _folder_attacks().items()},
}
