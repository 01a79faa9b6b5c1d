"""Opens a backbone from a folder, a hub id or a GGUF file, as a folder in Hugging Face layout."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dlp_edge.errors import BackboneError
from dlp_edge.export.gguf_file import dequantise_gguf
from dlp_edge.export.work_folder import finished_folder
from dlp_edge.models.architectures import (
    PROJECTION_OF,
    check_supported,
    module_name,
)
from dlp_edge.untrusted.regular_file import sha256_of

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = (".gguf", ".bin", ".safetensors", ".onnx")
# Files to download from a hub repository; never pickled weights.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


_NUMBERS = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Source:
    """A backbone on disk.

    Attributes:
        folder: config.json, *.safetensors, tokenizer.json.
        name: for display.
        fingerprint: SHA-256 of the weights before any dequantisation.
        config: the content of config.json.
        chat_template: the tokenizer's, or None.
        bos_token, eos_token: their text, for chat templates; "" if there is none.
        eos_token_ids: tokens that end an answer.
    """

    folder: Path
    name: str
    fingerprint: str
    config: dict[str, Any]
    chat_template: str | None
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(input size, output size) of every linear layer that an adapter may change."""
        wanted = {
            f"{module_name(layer, module)}.weight"
            for layer in range(self.config["num_hidden_layers"])
            for module in PROJECTION_OF
        }
        sizes: dict[str, tuple[int, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as file:
                    for key in wanted.intersection(file.keys()):
                        rows, columns = file.get_slice(key).get_shape()
                        sizes[key.removesuffix(".weight")] = (columns, rows)
            except (SafetensorError, OSError, ValueError) as error:
                raise BackboneError(f"{path} cannot be read ({error})", "Restore it") from error
        return sizes


@contextmanager
def load_source(
    backbone: str,
    work: Path | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Iterator[Source]:
    """Open a backbone: a folder, a GGUF file or a hub id.

    Args:
        work: keeps the dequantised weights of a GGUF file, for the next call; None keeps them in a
            temporary folder, which is removed at the end of the context.
        on_progress: called with the fraction done.

    Raises:
        BackboneError: it cannot be found or read, or its architecture is not supported.
    """
    path = Path(backbone)
    if path.is_dir():
        yield _open_folder(path, path.resolve().name)
    elif path.is_file() and path.suffix == ".gguf":
        with tempfile.TemporaryDirectory(prefix=".gguf-", ignore_cleanup_errors=True) as scratch:
            folder = (work or Path(scratch)) / "source"
            with finished_folder(folder) as empty:
                if empty is not None:
                    dequantise_gguf(path, empty, on_progress)
            yield _open_folder(folder, path.stem, sha256_of(path))
    elif path.exists() or path.suffix in _FILES or not _HUB_ID.fullmatch(backbone):
        raise BackboneError(
            f"{backbone} is no folder, GGUF file or hub id", "Check the path of the backbone"
        )
    else:
        yield _open_folder(_download(backbone, _HUB_FILES), backbone)


def dequantised_bytes(backbone: str) -> int:
    """Size of a GGUF file's weights in fp32, in bytes; 0 for other or unreadable backbones."""
    from gguf import GGUFReader

    path = Path(backbone)
    if not (path.is_file() and path.suffix == ".gguf"):
        return 0
    try:
        return 4 * sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    except Exception:  # the reader raises many types; `load_source` reports the error
        return 0


def adapter_folder(adapter: str) -> Path:
    """The folder of an adapter that is given as a folder or a hub id.

    Raises:
        BackboneError: it is a hub id, and cannot be fetched.
    """
    if Path(adapter).exists() or not _HUB_ID.fullmatch(adapter):
        return Path(adapter)
    return _download(adapter, _ADAPTER_FILES)


def _download(name: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise BackboneError(
            f"{name} is no folder here and cannot be fetched from the hub",
            "Check the name and the network, or give what is on this machine",
        ) from error


def _open_folder(folder: Path, name: str, fingerprint: str | None = None) -> Source:
    config = read_json(folder, "config.json")
    check_supported(config)
    for key in _NUMBERS:
        if type(config.get(key)) is not int or config[key] < 1:
            raise BackboneError(
                f"{folder / 'config.json'} has {key}={config.get(key)!r}", "Restore it"
            )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BackboneError(
            f"{folder} has no *.safetensors weights", "Save the model with safe serialization"
        )
    if not (folder / "tokenizer.json").is_file():
        raise BackboneError(f"{folder} has no tokenizer.json", "Save its fast tokenizer beside it")
    return Source(
        folder=folder,
        name=name,
        fingerprint=fingerprint or _fingerprint(weights),
        config=config,
        chat_template=_chat_template(folder),
        bos_token=_special_token(folder, "bos_token"),
        eos_token=_special_token(folder, "eos_token"),
        eos_token_ids=_eos_token_ids(folder, config),
    )


def _fingerprint(weights: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in weights:
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def _chat_template(folder: Path) -> str | None:
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        try:
            return separate.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BackboneError(f"{separate} is not UTF-8 text", "Restore it") from error
    if (folder / "tokenizer_config.json").is_file():
        template = read_json(folder, "tokenizer_config.json").get("chat_template")
        return template if isinstance(template, str) else None
    return None


def _special_token(folder: Path, name: str) -> str:
    """The text of a special token; the files hold it as a string or as {"content": string}."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            token = read_json(folder, file).get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return ""


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """From generation_config.json where there is one, since only it lists several."""
    settings = config
    if (folder / "generation_config.json").is_file():
        settings = read_json(folder, "generation_config.json")
    ids = settings.get("eos_token_id")
    ids = config.get("eos_token_id") if ids is None else ids
    if ids is None:
        raise BackboneError(f"{folder} names no eos_token_id", "Add it to its config.json")
    return tuple(ids) if isinstance(ids, list) else (int(ids),)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BackboneError(f"{folder} has no {name}", "Give a model's own folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{folder / name} cannot be read ({error})", "Restore it") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{folder / name} is not a JSON object", "Restore it")
    return content
