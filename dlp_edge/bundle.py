"""Reading and checking a bundle: the one place where a bundle's bytes are validated."""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dlp_edge import stack
from dlp_edge.errors import BundleError, DlpEdgeError, RouterError
from dlp_edge.manifest import FORMAT, VERSION, Manifest, edition_name
from dlp_edge.router_head import RouterHead, head_from_bytes
from dlp_edge.signing import TrustedKey, read_signature

MANIFEST = "manifest.json"
BACKBONE = "backbone.onnx"
BACKBONE_DATA = "backbone.onnx.data"
ADAPTERS = "adapters.safetensors"
ROUTER = "router.onnx"
ROUTER_HEAD = "router_head.safetensors"
ROUTER_TOKENIZER = "router_tokenizer.json"
TOKENIZER = "tokenizer.json"
REPORT = "report.json"

EDITED = (ADAPTERS, ROUTER_HEAD)  # what adding or removing an adapter writes anew
REQUIRED = (BACKBONE, BACKBONE_DATA, ADAPTERS, TOKENIZER, REPORT)
ROUTER_FILES = (ROUTER, ROUTER_HEAD, ROUTER_TOKENIZER)
MAX_MANIFEST_BYTES = 16 << 20
_REEXPORT = "Copy the bundle again or export it again"

T = TypeVar("T")


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest is valid and whose files are all there.

    Its files are read through `read`, which checks what it returns, or checked by `verify`.
    """

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked against the manifest.

        Raises:
            BundleError: the file has another hash than the manifest says.
        """
        try:
            data = self.path(name).read_bytes()
        except OSError as error:
            raise _damaged(name, f"cannot be read ({error.strerror})") from error
        self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def verify(self, name: str, tell: Callable[[float], None] = lambda fraction: None) -> None:
        """Checks a file that is too large to be held, or that another library reads by itself.

        Args:
            tell: called with the fraction that is done.

        Raises:
            BundleError: as `read`.
        """
        try:
            digest = sha256_of(self.path(name), tell)
        except OSError as error:
            raise _damaged(name, f"cannot be read ({error.strerror})") from error
        self._compare(name, digest)

    def adapters(self) -> stack.AdapterStack:
        """The stacked adapters, checked against the manifest's slots."""
        loaded = stack.from_bytes(self.read(file_name(self.manifest, ADAPTERS)))
        _check_stack(loaded, self.manifest)
        return loaded

    def router_head(self) -> RouterHead:
        """The router's last layer. Only for a bundle with a router.

        Raises:
            BundleError: the file is damaged, or has fewer rows than the router has labels.
        """
        try:
            head = head_from_bytes(self.read(file_name(self.manifest, ROUTER_HEAD)))
        except RouterError as error:
            raise BundleError(error.cause, _REEXPORT) from error
        entry = self.manifest.router
        if entry is not None and len(head.bias) < len(entry.settings.labels):
            raise _damaged(ROUTER_HEAD, "has fewer rows than the router has labels")
        return head

    def _compare(self, name: str, digest: str) -> None:
        if digest != self.manifest.files[name].sha256:
            raise _damaged(name, "has been changed since the export")


def open_bundle(folder: str | Path, trusted_key: TrustedKey | None = None) -> Bundle:
    """Reads the manifest and checks that every file is there with its size.

    Args:
        trusted_key: what the manifest must be signed with; checked before it is parsed.

    Raises:
        BundleError: no bundle, not signed with the key, another format version, a field or file
            that is wrong.
    """
    root = Path(folder)
    path = root / MANIFEST
    try:
        is_folder = root.is_dir()
    except OSError:  # a name that the system cannot have
        is_folder = False
    if not is_folder:
        raise BundleError(f"there is no bundle at {root}", "Check the path, or run dlp-edge export")
    if not path.is_file():
        raise BundleError(
            f"{root} has no {MANIFEST}, so it is no finished bundle", "Export it again"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST} is larger than any real one", _REEXPORT)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(MANIFEST, f"cannot be read ({error.strerror})") from error
    if trusted_key is not None:
        trusted_key.check(data, read_signature(root))
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} is not valid JSON ({error})", _REEXPORT) from error
    manifest = parse_manifest(document)
    for name, entry in manifest.files.items():
        _check_file(root, name, entry.size)
    return Bundle(root, manifest)


def parse_manifest(document: Any) -> Manifest:
    """The manifest from its JSON document.

    Raises:
        BundleError: wrong format or version, unknown, missing or mistyped fields.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(f"{MANIFEST} is not one of a dlp-edge bundle", "Check the path")
    if type(document.get("version")) is not int or document["version"] != VERSION:
        raise BundleError(
            f"the bundle has format version {document.get('version')!r}, this dlp-edge reads "
            f"version {VERSION}",
            "Update dlp-edge, or export the bundle again",
        )
    content = {key: value for key, value in document.items() if key not in ("format", "version")}
    if content.pop("checksum", None) != _checksum(content):
        raise BundleError(f"{MANIFEST} has been changed since the export", _REEXPORT)
    manifest = _parse(Manifest, content, "manifest")
    if manifest.edition < 0:
        raise BundleError(f"the edition in {MANIFEST} is {manifest.edition}", _REEXPORT)
    for name in REQUIRED + (ROUTER_FILES if manifest.router else ()):
        if file_name(manifest, name) not in manifest.files:
            raise BundleError(f"{MANIFEST} lists no {name}", _REEXPORT)
    if manifest.router is not None:
        unknown = set(manifest.router.settings.labels) - {
            adapter.name for adapter in manifest.adapters
        }
        if unknown:
            raise BundleError(f"the router knows {min(unknown)}, which is no adapter", _REEXPORT)
    return manifest


def file_name(manifest: Manifest, name: str) -> str:
    """The name under which a bundle of this manifest holds a file, such as ADAPTERS."""
    return edition_name(name, manifest.edition) if name in EDITED else name


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as the text of `manifest.json`."""
    content = json.loads(json.dumps(asdict(manifest)))
    document = {"format": FORMAT, "version": VERSION, "checksum": _checksum(content), **content}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content in a canonical form: against accidents, not against forgery."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path, tell: Callable[[float], None] = lambda fraction: None) -> str:
    """SHA-256 of a file, streamed; `tell` is called with the fraction that is done."""
    digest = hashlib.sha256()
    size = max(1, path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
            tell(file.tell() / size)
    return digest.hexdigest()


def _damaged(name: str, what: str) -> BundleError:
    return BundleError(f"{name} {what}", _REEXPORT)


def _check_file(root: Path, name: str, size: int) -> None:
    if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name:
        raise BundleError(f"{MANIFEST} names a file outside the bundle: {name!r}", _REEXPORT)
    path = root / name
    if path.is_symlink() or not path.is_file():
        raise _damaged(name, "is missing")
    if path.stat().st_size != size:
        raise _damaged(name, f"has {path.stat().st_size} bytes instead of {size}")


def _check_stack(loaded: stack.AdapterStack, manifest: Manifest) -> None:
    names = [adapter.name for adapter in manifest.adapters]
    if list(loaded.rows) != names:
        raise _damaged(ADAPTERS, "holds other adapters than the manifest lists")
    widths = {
        part.module: (slot.input_size, part.stop - part.start)
        for slot in manifest.backbone.slots
        for part in slot.parts
    }
    for module, a in loaded.a.items():
        if (a.shape[1], loaded.b[module].shape[1]) != widths.get(module):
            raise _damaged(ADAPTERS, f"does not fit the backbone at {module}")


def _parse(kind: type[T], value: Any, where: str) -> T:
    """Builds a dataclass from JSON, strictly: no unknown, missing or mistyped fields."""
    if not isinstance(value, dict):
        raise BundleError(f"{where} is not an object in {MANIFEST}", _REEXPORT)
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if set(value) != set(names):
        odd = min(set(value) ^ set(names))
        state = "unknown" if odd in value else "missing"
        raise BundleError(f"{where}.{odd} is {state} in {MANIFEST}", _REEXPORT)
    values = {name: _convert(hints[name], value[name], f"{where}.{name}") for name in names}
    try:
        return kind(**values)
    except DlpEdgeError as error:
        raise BundleError(f"{where} in {MANIFEST}: {error.cause}", _REEXPORT) from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(inner, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where} is not a list in {MANIFEST}", _REEXPORT)
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise BundleError(f"{where} is not an object in {MANIFEST}", _REEXPORT)
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise BundleError(f"{where} in {MANIFEST} is {value!r}", _REEXPORT)
        return value
    if is_dataclass(hint):
        return _parse(typing.cast("type[Any]", hint), value, where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise BundleError(f"{where} is not of type {hint.__name__} in {MANIFEST}", _REEXPORT)
    return value
