"""Attacks by safetensors files: the stacked adapters, the router's last layer, PEFT adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from tests.security.attacks.forge import Attack, replaced

Header = dict[str, Any]
Change = Callable[[bytes], bytes]


def on_header(change: Callable[[Header], object]) -> Change:
    """Changes the header and leaves the tensors' bytes."""

    def content(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        return with_header(json.dumps(header).encode(), data[8 + length :])

    return content


def on_text(change: Callable[[bytes], bytes]) -> Change:
    """Changes the header's text."""

    def content(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        return with_header(change(data[8 : 8 + length]), data[8 + length :])

    return content


def with_header(header: bytes, rest: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + rest


def first(header: Header) -> Header:
    """The entry of the tensor that lies first."""
    names = [name for name in header if name != "__metadata__"]
    found: Header = header[min(names, key=lambda name: header[name]["data_offsets"])]
    return found


def _twice(text: bytes) -> bytes:
    header = json.loads(text)
    name = next(name for name in header if name != "__metadata__")
    return text[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:]


CHANGES: dict[str, Change] = {
    "empty": lambda data: b"",
    "seven bytes": lambda data: data[:7],
    "header longer than the file": lambda data: (len(data)).to_bytes(8, "little") + data[8:],
    "header of 16 exabytes": lambda data: b"\xff" * 8 + data[8:],
    "header of 100 MB": lambda data: (100 << 20).to_bytes(8, "little") + data[8:],
    "header is no JSON": on_text(lambda text: b"x" * len(text)),
    "header is a list": on_text(lambda text: b"[]"),
    "header nested": on_text(lambda text: b"[" * 1_000_000),
    "header is no UTF-8": on_text(lambda text: b"\xff" + text),
    "tensor twice": on_text(_twice),
    "cut": lambda data: data[:-1],
    "trailing bytes": lambda data: data + b"PK\x03\x04",
    "overlap": on_header(lambda h: [e.update(data_offsets=first(h)["data_offsets"])
                                    for n, e in h.items() if n != "__metadata__"]),
    "hole": on_header(lambda h: [e.update(data_offsets=[at + 4 for at in e["data_offsets"]])
                                 for n, e in h.items() if n != "__metadata__"]),
    "offsets backwards": on_header(lambda h: first(h)["data_offsets"].reverse()),
    "offsets negative": on_header(lambda h: first(h).update(data_offsets=[-8, 0])),
    "offsets huge": on_header(lambda h: first(h).update(data_offsets=[0, 10**30])),
    "three offsets": on_header(lambda h: first(h)["data_offsets"].append(0)),
    "shape negative": on_header(lambda h: first(h).update(shape=[-1, -1])),
    "shape huge": on_header(lambda h: first(h).update(shape=[1 << 40, 1 << 40])),
    "shape with zero": on_header(lambda h: first(h).update(shape=[0, 64], data_offsets=[0, 0])),
    "shape of floats": on_header(lambda h: first(h).update(shape=[1.0, 64.0])),
    "shape of many dimensions": on_header(lambda h: first(h).update(shape=[1] * 1_000)),
    "shape is a text": on_header(lambda h: first(h).update(shape="4")),
    "unknown type": on_header(lambda h: first(h).update(dtype="F8_E4M3")),
    "type is no text": on_header(lambda h: first(h).update(dtype=["F32"])),
    "entry with more": on_header(lambda h: first(h).update(extra=1)),
    "metadata of numbers": on_header(lambda h: h.update(__metadata__={"layout": 1})),
    "a hundred thousand tensors": on_header(
        lambda h: h.update({f"x{i}": first(h) for i in range(20_001)})
    ),
}  # fmt: skip


def _layout(change: Callable[[Any], object]) -> Change:
    def edit(header: Header) -> None:
        layout = json.loads(header["__metadata__"]["layout"])
        change(layout)
        header["__metadata__"]["layout"] = json.dumps(layout)

    return on_header(edit)


def _rows(layout: Any) -> list[Any]:
    found: list[Any] = layout["sums"]["model.layers.0.self_attn.q_proj"]
    return found


def valued(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    """Changes tensors; the metadata stays."""

    def content(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
        tensors = {name: array.copy() for name, array in load(data).items()}
        change(tensors)
        return save(tensors, metadata)

    return content


def _set(name: str, value: float) -> Callable[[dict[str, np.ndarray]], object]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        key = next(key for key in tensors if key.endswith(name))
        tensors[key].flat[0] = value

    return change


_STACK: dict[str, Change] = {
    "A is NaN": valued(_set(".A", np.nan)),
    "B is infinite": valued(_set(".B", np.inf)),
    "A is beyond half precision": valued(_set(".A", 70_000)),
    "B is beyond half precision": valued(_set(".B", -70_000)),
    "no metadata": on_header(lambda h: h.pop("__metadata__")),
    "layout is no JSON": on_header(lambda h: h["__metadata__"].update(layout="{")),
    "layout nested": on_header(lambda h: h["__metadata__"].update(layout="[" * 1_000_000)),
    "layout is a list": on_header(lambda h: h["__metadata__"].update(layout="[]")),
    "layout is empty": on_header(lambda h: h["__metadata__"].update(layout="{}")),
    "layout of an unknown module": _layout(lambda t: t["sums"].update({"x": [0, 1, 1.0]})),
    "layout of an unknown adapter": _layout(lambda t: t.update(evil={})),
    "rows outside": _layout(lambda t: _rows(t).__setitem__(0, 10**6)),
    "rows negative": _layout(lambda t: _rows(t).__setitem__(0, -1)),
    "rows shared": _layout(lambda t: _rows(t).__setitem__(1, 12)),
    "rows of nobody": _layout(lambda t: _rows(t).__setitem__(1, 1)),
    "rank is a text": _layout(lambda t: _rows(t).__setitem__(1, "4")),
    "scaling is true": _layout(lambda t: _rows(t).__setitem__(2, True)),
    "scaling is NaN": _layout(lambda t: _rows(t).__setitem__(2, float("nan"))),
    "scaling is huge": _layout(lambda t: _rows(t).__setitem__(2, 1e30)),
    "scaling beyond floats": _layout(lambda t: _rows(t).__setitem__(2, 10**400)),
    "A without B": valued(lambda t: t.pop(next(k for k in t if k.endswith(".B")))),
    "a tensor more": valued(lambda t: t.update(evil=np.zeros((2, 2), np.float32))),
    "A of another width": valued(
        lambda t: t.update({k: np.zeros((len(v), 7), np.float32) for k, v in t.items()})
    ),
    "tensors of integers": valued(
        lambda t: t.update({k: v.astype(np.int64) for k, v in t.items()})
    ),
    "tensors of half the type": valued(
        lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()})
    ),
}

_HEAD: dict[str, Change] = {
    "weight is NaN": valued(lambda t: t["weight"].__setitem__((0, 0), np.nan)),
    "bias is infinite": valued(lambda t: t["bias"].__setitem__(0, np.inf)),
    "features are NaN": valued(lambda t: t["features"].__setitem__((0, 0), np.nan)),
    "weight is huge in features": valued(lambda t: t.update(features=t["features"][:, :3].copy())),
    "one row": valued(lambda t: t.update(weight=t["weight"][:1].copy(), bias=t["bias"][:1].copy())),
    "rows of none": valued(lambda t: t["rows"].__setitem__(0, 10**9)),
    "rows negative": valued(lambda t: t["rows"].__setitem__(0, -1)),
    "a tensor less": valued(lambda t: t.pop("bias")),
    "a tensor more": valued(lambda t: t.update(evil=np.zeros(2, np.float32))),
    "another width": valued(
        lambda t: t.update(weight=t["weight"][:, :8].copy(), features=t["features"][:, :8].copy())
    ),
    "bias of two dimensions": valued(lambda t: t.update(bias=t["bias"][None].copy())),
}

ATTACKS: dict[str, Attack] = {
    f"{what}: {name}": replaced(file, change)
    for file, what, changes in (
        ("adapters.safetensors", "stack", {**CHANGES, **_STACK}),
        ("router_head.safetensors", "router head", {**CHANGES, **_HEAD}),
    )
    for name, change in changes.items()
}
