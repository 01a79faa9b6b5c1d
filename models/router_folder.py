"""A trained router on disk: router.json, router.safetensors and tokenizer.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from dlp_edge.errors import RouterError
from dlp_edge.manifest import RouterSettings
from dlp_edge.runtime.router import check_settings

FORMAT = "dlp-edge-router"
VERSION = 1
CARD = "router.json"
WEIGHTS = "router.safetensors"
TOKENIZER = "tokenizer.json"
ARCHITECTURES = ("mlp",)
_RETRAIN = "Train it again with `dlp-edge train-router`"


@dataclass(frozen=True)
class RouterAccuracy:
    """Shares of held-out examples whose most probable label is right; None where there are none.

    Attributes:
        prompts: dev prompts as they are.
        bare_prompts: without the wording that the task's prompts have in common.
        sentences: the sentences after the first, in answers to two or three dev prompts at once.
    """

    prompts: float | None
    bare_prompts: float | None
    sentences: float | None


@dataclass(frozen=True)
class RouterReport:
    """What training made and measured (`router.json`)."""

    architecture: str
    settings: RouterSettings
    vocab_size: int
    parameters: int
    accuracy: RouterAccuracy
    examples: int
    seconds: float
    seed: int


@dataclass(frozen=True)
class RouterFolder:
    """Everything that a router folder holds; weights are fp16 on disk, float32 here."""

    architecture: str
    settings: RouterSettings
    vocab_size: int
    weights: dict[str, Tensor]
    tokenizer: Tokenizer


def is_router_folder(folder: Path) -> bool:
    """Whether a folder looks like a router, so that training may replace it."""
    return (folder / CARD).is_file() and (folder / WEIGHTS).is_file()


def write_router(
    folder: Path, report: RouterReport, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Writes the three files into an existing folder."""
    halves = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    save_file(halves, folder / WEIGHTS)
    tokenizer.save(str(folder / TOKENIZER), pretty=False)
    card = {"format": FORMAT, "version": VERSION, **asdict(report)}
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def read_settings(folder: Path) -> tuple[str, int, RouterSettings]:
    """Architecture, vocabulary size (with the separator) and settings, from router.json.

    Raises:
        RouterError: it is missing or damaged, or of another version or architecture.
    """
    card = _read_card(folder / CARD)
    if card.get("format") != FORMAT:
        raise RouterError(f"{folder / CARD} does not describe a router", _RETRAIN)
    if card.get("version") != VERSION:
        raise RouterError(
            f"{folder} is a router of format {card.get('version')}, this release reads {VERSION}",
            _RETRAIN,
        )
    if card.get("architecture") not in ARCHITECTURES:
        raise RouterError(
            f"{folder} has the unknown architecture {card.get('architecture')!r}",
            f"Train one of {', '.join(ARCHITECTURES)}",
        )
    try:
        record = card["settings"]
        settings = RouterSettings(
            labels=tuple(str(label) for label in record["labels"]),
            prompt_tokens=int(record["prompt_tokens"]),
            generated_tokens=int(record["generated_tokens"]),
            temperature=float(record["temperature"]),
        )
        vocab_size = int(card["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise RouterError(
            f"{folder / CARD} is damaged ({type(error).__name__}: {error})", _RETRAIN
        ) from error
    check_settings(settings)
    return card["architecture"], vocab_size, settings


def read_router(folder: Path) -> RouterFolder:
    """A whole router folder.

    Raises:
        RouterError: a file is missing or damaged, or the files do not belong together.
    """
    architecture, vocab_size, settings = read_settings(folder)
    try:
        halves = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise RouterError(f"{folder / WEIGHTS} cannot be read ({error})", _RETRAIN) from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # tokenizers raises plain Exception
        raise RouterError(f"{folder / TOKENIZER} cannot be read ({error})", _RETRAIN) from error
    if tokenizer.get_vocab_size() + 1 != vocab_size:
        raise RouterError(
            f"{folder / TOKENIZER} has {tokenizer.get_vocab_size()} pieces, "
            f"the router was trained with {vocab_size - 1}",
            _RETRAIN,
        )
    weights = {name: value.to(torch.float32) for name, value in halves.items()}
    return RouterFolder(architecture, settings, vocab_size, weights, tokenizer)


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RouterError(
            f"{path.parent} is not a router ({CARD}: {error.strerror})",
            "Name a folder that `dlp-edge train-router` wrote",
        ) from error
    except (ValueError, RecursionError) as error:
        raise RouterError(f"{path} is damaged ({error})", _RETRAIN) from error
    if not isinstance(card, dict):
        raise RouterError(f"{path} is damaged (it holds no object)", _RETRAIN)
    return card
