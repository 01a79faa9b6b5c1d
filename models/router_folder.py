"""A trained router on disk: router.json, router.safetensors, head.safetensors, tokenizer.json,
splitter.safetensors, and the report of its training."""

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

from dlp_edge.bundle.manifest import RouterSettings
from dlp_edge.bundle.router_head import RouterHead, head_from_bytes, head_to_bytes
from dlp_edge.errors import RouterError
from dlp_edge.models.confidence_calibration import Threshold
from dlp_edge.models.evaluation import Measured
from dlp_edge.models.splitter.network import SplitterNetwork
from dlp_edge.runtime.routing.router_input import check_settings

FORMAT = "dlp-edge-router"
VERSION = 2
CARD = "router.json"
WEIGHTS = "router.safetensors"
HEAD = "head.safetensors"
SPLITTER = "splitter.safetensors"
TOKENIZER = "tokenizer.json"
ARCHITECTURES = ("mlp", "albert")
_RETRAIN = "Train it again with `dlp-edge train-router`"


@dataclass(frozen=True)
class RouterReport:
    """Settings and metrics of a trained router (`router.json`).

    Attributes:
        min_confidence: below it the base model answers, unless a request says otherwise.
        network: settings of the architecture, where it has any.
        measured: by kind of held-out examples.
        others_to_base: the share of held-out text of none of the tasks that gets no adapter.
        thresholds: other choices of `min_confidence`, and what each keeps and leaves to the base
            model.
        splitter: of held-out prompts of one, two, three and four requests, the share whose
            requests are all found (`dlp_edge.models.splitter.measuring`); None without a splitter.
    """

    architecture: str
    settings: RouterSettings
    min_confidence: float
    vocab_size: int
    parameters: int
    network: dict[str, int]
    measured: dict[str, Measured]
    others_to_base: float
    thresholds: tuple[Threshold, ...]
    examples: int
    seconds: float
    seed: int
    splitter: dict[str, float] | None = None


@dataclass(frozen=True)
class RouterCard:
    """The part of router.json that inference needs."""

    architecture: str
    settings: RouterSettings
    min_confidence: float
    vocab_size: int
    network: dict[str, int]


@dataclass(frozen=True)
class RouterFolder:
    """The content of a router folder. Weights are fp16 on disk, float32 here, and exclude the last
    layer, which is in `head`; `splitter` is missing from those of earlier releases."""

    card: RouterCard
    weights: dict[str, Tensor]
    head: RouterHead
    tokenizer: Tokenizer
    splitter: SplitterNetwork | None = None


def is_router_folder(folder: Path) -> bool:
    """Whether a folder looks like a router, so that training may replace it."""
    return (folder / CARD).is_file() and (folder / WEIGHTS).is_file()


def write_router(
    folder: Path,
    report: RouterReport,
    weights: dict[str, Tensor],
    head: RouterHead,
    tokenizer: Tokenizer,
    splitter: SplitterNetwork | None,
) -> None:
    """Write the files into an existing folder."""
    halves = {
        name: value.to(torch.float16).contiguous()
        for name, value in weights.items()
        if not name.startswith("head.")
    }
    save_file(halves, folder / WEIGHTS)
    (folder / HEAD).write_bytes(head_to_bytes(head))
    if splitter is not None:
        state = splitter.state_dict().items()
        stored = {name: value.to(torch.float16).contiguous() for name, value in state}
        save_file(stored, folder / SPLITTER)
    tokenizer.save(str(folder / TOKENIZER), pretty=False)
    card = {"format": FORMAT, "version": VERSION, **asdict(report)}
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def read_card(folder: Path) -> RouterCard:
    """Read router.json.

    Raises:
        RouterError: it is missing or damaged, or of an unsupported version or architecture.
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
        found = RouterCard(
            architecture=card["architecture"],
            settings=RouterSettings(
                labels=tuple(str(label) for label in record["labels"]),
                prompt_tokens=int(record["prompt_tokens"]),
                generated_tokens=int(record["generated_tokens"]),
                temperature=float(record["temperature"]),
                spread=bool(record.get("spread", False)),
            ),
            min_confidence=float(card["min_confidence"]),
            vocab_size=int(card["vocab_size"]),
            network={str(key): int(value) for key, value in card["network"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RouterError(
            f"{folder / CARD} is damaged ({type(error).__name__}: {error})", _RETRAIN
        ) from error
    check_settings(found.settings)
    return found


def read_router(folder: Path) -> RouterFolder:
    """Read a router folder.

    Raises:
        RouterError: a file is missing or damaged, or the files do not belong together.
    """
    card = read_card(folder)
    try:
        halves = load_file(folder / WEIGHTS)
        head = head_from_bytes((folder / HEAD).read_bytes())
    except (OSError, SafetensorError) as error:
        raise RouterError(f"the weights in {folder} cannot be read ({error})", _RETRAIN) from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # tokenizers raises plain Exception
        raise RouterError(f"{folder / TOKENIZER} cannot be read ({error})", _RETRAIN) from error
    if tokenizer.get_vocab_size() + 1 != card.vocab_size:
        raise RouterError(
            f"{folder / TOKENIZER} has {tokenizer.get_vocab_size()} pieces, "
            f"the router was trained with {card.vocab_size - 1}",
            _RETRAIN,
        )
    if len(head.bias) < len(card.settings.labels):
        raise RouterError(f"the weights in {folder} do not fit its settings", _RETRAIN)
    weights = {name: value.to(torch.float32) for name, value in halves.items()}
    splitter = _read_splitter(folder, len(card.settings.labels), tokenizer.get_vocab_size())
    return RouterFolder(card, weights, head, tokenizer, splitter)


def _read_splitter(folder: Path, num_tasks: int, vocab_size: int) -> SplitterNetwork | None:
    if not (folder / SPLITTER).is_file():
        return None
    network = SplitterNetwork(vocab_size, num_tasks)
    try:
        network.load_state_dict(load_file(folder / SPLITTER))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RouterError(
            f"{folder / SPLITTER} cannot be read ({str(error).splitlines()[0]})", _RETRAIN
        ) from error
    return network.eval()


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
