"""A session's KV cache as a file: what one fusion computed of it, and what it was computed with."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dlp_edge.bundle.manifest import Manifest
from dlp_edge.runtime.engine.decoder import Decoder

FORMAT = "dlp-edge-cache"
HEADER_BYTES = 1 << 20  # of a file besides its keys and values


def to_bytes(decoder: Decoder, manifest: Manifest) -> bytes | None:
    """The cache of a decoder's first sequence; None if there is none."""
    tokens, label = decoder.first_run(0)
    if not tokens or not isinstance(label, frozenset):
        return None
    values = decoder.read(0, 0, len(tokens))
    described = json.dumps({"tokens": tokens, "fusion": dict(sorted(label))})
    metadata = {
        "format": FORMAT,
        "bundle": _bundle_of(manifest),
        "described": described,
        "sha256": _digest(described, values.tobytes()),
    }
    return save({"values": values}, metadata)


def restore(data: bytes, decoder: Decoder, manifest: Manifest) -> None:
    """Fills the cache of a decoder's first sequence with what `to_bytes` gave.

    Raises:
        ValueError: it is damaged, or of another bundle.
    """
    try:
        values = load(data)["values"]
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        described = metadata["described"]
        if metadata["sha256"] != _digest(described, values.tobytes()):
            raise ValueError("its checksum is wrong")
        content = json.loads(described)
        tokens = [int(token) for token in content["tokens"]]
        label = frozenset((str(name), float(weight)) for name, weight in content["fusion"].items())
    except (SafetensorError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__})") from error
    if metadata.get("bundle") != _bundle_of(manifest):
        raise ValueError("it is of another bundle")
    expected = decoder.read(0, 0, 0)
    shape = (*expected.shape[:2], len(tokens), expected.shape[3])
    if values.shape != shape or values.dtype != expected.dtype or len(tokens) > decoder.max_context:
        raise ValueError("it does not fit this context")
    if not np.isfinite(values).all():
        raise ValueError("its numbers are not finite")
    decoder.labels[0] = label
    decoder.write(0, tokens, [values])


def _bundle_of(manifest: Manifest) -> str:
    """What the numbers of a cache depend on besides its tokens and fusion."""
    files = {name: entry.sha256 for name, entry in sorted(manifest.files.items())}
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _digest(described: str, values: bytes) -> str:
    return hashlib.sha256(described.encode() + values).hexdigest()
