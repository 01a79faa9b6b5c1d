"""Reads a skill's samples: requests and answers as JSON Lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlp_edge.errors import RouterError
from dlp_edge.untrusted.regular_file import read_followed

LINE_FORMAT = 'Each line holds {"prompt": text, "response": text, "choices": [text, ...]?}'
MAX_FILE_BYTES = 256 << 20
MAX_CHARACTERS = 1_000_000  # per text; anything longer is hardly a request


@dataclass(frozen=True)
class Sample:
    """One request and its answer; `choices` are the offered answers of a multiple-choice task."""

    prompt: str
    response: str
    choices: tuple[str, ...] = ()


def read_samples(path: Path, response_needed: bool = True) -> tuple[Sample, ...]:
    """Reads the samples of a .jsonl file.

    Args:
        response_needed: False accepts lines without a response, which becomes "".

    Raises:
        RouterError: the file cannot be read, has no samples, or has an invalid line.
    """
    try:
        lines = read_followed(path, MAX_FILE_BYTES).decode("utf-8-sig").split("\n")
    except OSError as error:
        raise RouterError(
            f"{path} cannot be read ({error.strerror})", "Check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise RouterError(f"{path} is not UTF-8 text ({error.reason})", LINE_FORMAT) from error
    samples = tuple(
        parse_sample(line, f"{path}, line {number}", response_needed)
        for number, line in enumerate(lines, 1)
        if line.strip()
    )
    if not samples:
        raise RouterError(f"{path} holds no samples", LINE_FORMAT)
    return samples


def parse_sample(line: str, where: str, response_needed: bool = True) -> Sample:
    """Parses one line; `where` names it in errors. Raises RouterError."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RouterError(f"{where} is not JSON ({error})", LINE_FORMAT) from error
    return as_sample(record, where, response_needed)


def as_sample(record: object, where: str, response_needed: bool = True) -> Sample:
    """Checks a parsed record; `where` names it in errors. Raises RouterError."""
    if not isinstance(record, dict):
        raise RouterError(f"{where} is not a JSON object", LINE_FORMAT)
    prompt = _text(record.get("prompt"), "prompt", where)
    if response_needed or record.get("response"):
        response = _text(record.get("response"), "response", where)
    else:
        response = ""
    choices = record.get("choices", [])
    if not isinstance(choices, (list, tuple)) or not all(isinstance(c, str) for c in choices):
        raise RouterError(f"{where} has 'choices' that are not a list of texts", LINE_FORMAT)
    return Sample(prompt, response, tuple(choices))


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RouterError(f"{where} has no text for {key!r}", LINE_FORMAT)
    if len(value) > MAX_CHARACTERS:
        raise RouterError(
            f"{where} has {len(value):,} characters for {key!r}",
            f"Keep each text under {MAX_CHARACTERS:,}",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RouterError(f"{where} has invalid Unicode in {key!r}", "Correct the text") from error
    return value
