"""What is fuzzed: readers of a stranger's bytes. Each takes bytes and must give a typed error or
nothing at all; any other exception, a dead process and a hang are bugs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dlp_edge.bundle.bundle import Bundle, _checksum, open_bundle
from dlp_edge.bundle.peft_reader import CONFIG, WEIGHTS, read_adapter
from dlp_edge.bundle.verify import verify_bundle
from dlp_edge.errors import AdapterError, BundleError, NonFiniteError, RouterError, UsageError
from dlp_edge.runtime.batching.scheduler import Scheduler
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.runtime import Runtime
from dlp_edge.runtime.session import load_session
from dlp_edge.runtime.session_backend import SessionBackend
from dlp_edge.runtime.stream import OpenStreams
from dlp_edge.tasks.samples import read_samples
from tests.testing.paths import DATA

KEPT = DATA / "bundle-v2"
MANIFEST = "manifest.json"
# The files of a bundle that are parsed, and what does it. An input's first byte says which of them
# the rest is.
CHECKS: dict[str, Callable[[Bundle], object]] = {
    MANIFEST: Bundle.check,
    "adapters.safetensors": Bundle.adapters,
    "router_head.safetensors": Bundle.router_head,
    "backbone.onnx": Bundle.graph,
    "router.onnx": Bundle.router,
    "tokenizer.json": lambda bundle: bundle.tokenizer("tokenizer.json"),
    "router_tokenizer.json": lambda bundle: bundle.tokenizer("router_tokenizer.json"),
    "report.json": Bundle.report,
}
PARTS = tuple(CHECKS)

_here = Path(tempfile.mkdtemp(prefix="dlp-edge-fuzz-"))
_bundle = Path(shutil.copytree(KEPT, _here / "bundle"))
_document = json.loads((KEPT / MANIFEST).read_bytes())
_kept = open_bundle(KEPT).manifest
_sizes = {
    part.module: (slot.input_size, part.stop - part.start)
    for slot in _kept.backbone.slots
    for part in slot.parts
}


def clean_up() -> None:
    shutil.rmtree(_here, ignore_errors=True)


def bundle(data: bytes) -> None:
    """The validator, hashes put right so that it gets beyond them."""
    _with_part(data, lambda folder, name: CHECKS[name](open_bundle(folder)))


def runtime(data: bytes) -> None:
    """What passes the validator is loaded and answers."""

    def load(folder: Path, name: str) -> None:
        verify_bundle(folder)
        # A template may make nothing of the prompt, or too much; finite weights may overflow.
        with (
            Runtime(folder, max_context=32, threads=1) as loaded,
            contextlib.suppress(UsageError, NonFiniteError),
        ):
            loaded.generate("Count 3", max_new_tokens=2)

    _with_part(data, load)


def _with_part(data: bytes, use: Callable[[Path, str], object]) -> None:
    name, content = PARTS[data[0] % len(PARTS)] if data else MANIFEST, data[1:]
    try:
        (_bundle / MANIFEST).write_bytes(_sealed(name, content))
        if name != MANIFEST:
            (_bundle / name).write_bytes(content)
        use(_bundle, name)
    except BundleError:
        pass
    finally:
        shutil.copyfile(KEPT / name, _bundle / name)


def _sealed(name: str, content: bytes) -> bytes:
    """The manifest, right about a part that was exchanged; or a fuzzed manifest with its checksum
    put right, where it is one."""
    if name != MANIFEST:
        entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return _with_checksum({**_document, "files": {**_document["files"], name: entry}})
    try:
        document = json.loads(content)
        return _with_checksum(document) if isinstance(document, dict) else content
    except (ValueError, RecursionError):
        return content


def _with_checksum(document: dict[str, Any]) -> bytes:
    inner = {k: v for k, v in document.items() if k not in ("format", "version", "checksum")}
    return json.dumps({**document, "checksum": _checksum(inner)}).encode()


def peft(data: bytes) -> None:
    """The PEFT reader: two bytes with the length of the configuration, it, and the weights."""
    length = int.from_bytes(data[:2], "little")
    folder = _here / "peft"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(data[2 : 2 + length])
    (folder / WEIGHTS).write_bytes(data[2 + length :])
    with contextlib.suppress(AdapterError):
        read_adapter("fuzzed", folder, _sizes, slots_only=True)


def session(data: bytes) -> None:
    """The reader of saved conversations."""
    closing = Interrupt()
    host = SessionBackend(_never_answered, Scheduler(1), OpenStreams(closing), closing)
    (_here / "chat.json").write_bytes(data)
    with contextlib.suppress(UsageError):
        load_session(host, _here / "chat.json")


def _never_answered(*_: object) -> NoReturn:
    raise RuntimeError("a session that was only loaded began to answer")


def samples(data: bytes) -> None:
    """The reader of tasks and examples."""
    (_here / "samples.jsonl").write_bytes(data)
    for response_needed in (True, False):
        with contextlib.suppress(RouterError):
            read_samples(_here / "samples.jsonl", response_needed)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "bundle": bundle,
    "runtime": runtime,
    "peft": peft,
    "session": session,
    "samples": samples,
}
