"""The contents of a bundle's `manifest.json`, as dataclasses.

Compatibility: a field added within a VERSION is optional. It has a default that means what its
absence meant before, and it is listed in `manifest_parser.OPTIONAL`. Every other change of a field
(required, renamed, removed, another type or meaning) raises VERSION. Readers refuse unknown fields
and other versions, so newer readers load older bundles of the same version, not the reverse.
A default alone makes no field optional: `edition` has one for callers and is always in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from dlp_edge.checks import check_number
from dlp_edge.errors import UsageError
from dlp_edge.types import SelectRule, WeighRule

FORMAT = "dlp-edge-bundle"
VERSION = 2

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "up to 64 letters, digits, '.', '_' and '-', starting with a letter or digit"
# Whatever follows the first dot.
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
RESERVED_NAMES = ("auto", "base")  # the server's and the chat's words for no adapter of this name


@dataclass(frozen=True)
class SelectionRule:
    """How router probabilities become fusion weights.

    Attributes:
        select: `nucleus` keeps the most probable adapters until their sum reaches p (the
            authors' code); `threshold` keeps every y_r >= p, or the largest if there is none
            (eq. 4 as printed); `top_k` keeps the k largest.
        weigh: `softmax` over the selected probabilities (eq. 5) or `renormalise` (y_r / sum).
        min_confidence: if the largest probability is below this, nothing is selected and the
            base model answers.
    """

    select: SelectRule = "nucleus"
    p: float = 0.6
    k: int = 2
    weigh: WeighRule = "softmax"
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.select not in get_args(SelectRule):
            raise UsageError(
                f"unknown selection rule {self.select!r}",
                f"Use one of {', '.join(get_args(SelectRule))}",
            )
        if self.weigh not in get_args(WeighRule):
            raise UsageError(
                f"unknown weighing {self.weigh!r}",
                f"Use one of {', '.join(get_args(WeighRule))}",
            )
        check_number("p", self.p)
        check_number("k", self.k, whole=True)
        check_number("min_confidence", self.min_confidence)
        if not 0 < self.p <= 1:
            raise UsageError(f"p is {self.p}", "Choose 0 < p <= 1")
        if self.k < 1:
            raise UsageError(f"k is {self.k}", "Choose k >= 1")
        if not 0 <= self.min_confidence <= 1:
            raise UsageError(
                f"min_confidence is {self.min_confidence}", "Choose 0 <= min_confidence <= 1"
            )


@dataclass(frozen=True)
class SlotPart:
    """The columns [start, stop) of a slot's output that belong to one linear layer."""

    module: str
    start: int
    stop: int


@dataclass(frozen=True)
class Slot:
    """A point in the graph where a low-rank pair is added to a weight matrix.

    Its graph inputs are `<name>.A` [G, rho, input_size] and `<name>.B` [G, rho, output_size]:
    output += (x A^T) B. Linear layers with the same input (q, k, v) share a slot.
    """

    name: str
    input_size: int
    output_size: int
    parts: tuple[SlotPart, ...]


class TextBackbone(Protocol):
    """What rendering and tokenizing a prompt needs to know of a backbone."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token(self) -> str: ...
    @property
    def eos_token(self) -> str: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class BackboneEntry:
    """The backbone and the dimensions of its graph.

    Attributes:
        fingerprint: SHA-256 of the weights it was exported from.
        dtype: numpy dtype of the KV cache, slots and logits.
    """

    name: str
    fingerprint: str
    architecture: str
    quantisation: str
    dtype: Literal["float32", "float16"]
    context_length: int
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_size: int
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of the stacked file.

    Attributes:
        rank: the largest rank over its modules.
        target_modules: the kinds of linear layers it changes, such as `self_attn.q_proj`.
        sha256: SHA-256 of the PEFT weight file.
    """

    name: str
    rank: int
    target_modules: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class RouterSettings:
    """The router's inputs and labels.

    Attributes:
        labels: adapter names, in the order of the rows of its last layer.
        prompt_tokens, generated_tokens: maximum tokens read from the prompt and the answer.
        temperature: divides the scores before the softmax (fitted on held-out text).
        spread: whether the router reads segments spread over a long prompt instead of its start
            and end. Missing from bundles of earlier releases.
    """

    labels: tuple[str, ...]
    prompt_tokens: int
    generated_tokens: int
    temperature: float
    spread: bool = False


@dataclass(frozen=True)
class RouterEntry:
    """The router: its settings, and the default rule from probabilities to fusion weights.

    Attributes:
        splitter: whether the bundle has a request splitter. Missing from bundles of earlier
            releases.
    """

    architecture: str
    settings: RouterSettings
    selection: SelectionRule
    splitter: bool = False


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of a file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime needs to know before it opens any other file of the bundle.

    Attributes:
        target: the devices that it was exported for: "cpu", "cuda" or "webgpu", or several in this
            order, joined by commas.
        edition: 0 as exported, incremented whenever an adapter is added or removed. It is part
            of the names of the files that such a change replaces (`edition_name`).
    """

    created_with: str
    target: str
    backbone: BackboneEntry
    chat_template: str | None
    adapters: tuple[AdapterEntry, ...]
    router: RouterEntry | None
    files: dict[str, FileEntry]
    edition: int = 0

    @property
    def targets(self) -> tuple[str, ...]:
        """The devices that it was exported for."""
        return tuple(self.target.split(","))


@dataclass(frozen=True)
class ServedBackbone:
    """A backbone that another server runs; see `BackboneEntry`.

    Attributes:
        context_length: tokens of prompt and answer together that the server is started for.
    """

    name: str
    fingerprint: str
    context_length: int
    vocab_size: int
    bos_token: str
    eos_token: str
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class RouterManifest:
    """The `routing.json` of a router folder: what routes and words the requests to a backbone that
    another server runs.

    Attributes:
        max_skills: the most adapters of a fusion. Those with the smallest weights are left out.
        max_rank: the largest rank that such a fusion has, as the server has to be told.
    """

    created_with: str
    backbone: ServedBackbone
    chat_template: str | None
    adapters: tuple[AdapterEntry, ...]
    router: RouterEntry | None
    max_skills: int
    max_rank: int
    files: dict[str, FileEntry]

    @property
    def edition(self) -> int:
        """A router folder has only one."""
        return 0


def check_adapter_name(name: str, others: Iterable[str] = ()) -> str | None:
    """Returns what is wrong with the name of a new adapter; None if nothing is.

    Args:
        others: the names beside it. Folders of tasks and adapters are called like their adapter,
            so a name must be one of a file on every system.
    """
    if not ADAPTER_NAME.fullmatch(name):
        return f"Use {NAME_RULE}"
    if name.lower() in RESERVED_NAMES:
        return f"Use another: {' and '.join(RESERVED_NAMES)} mean routing and the base model"
    if name.endswith(".") or _WINDOWS_DEVICE.fullmatch(name):
        return "Use another: Windows allows no file of this name"
    for other in others:
        if name != other and name.lower() == other.lower():
            return f"Use another: it differs from {other} in case only"
    return None


def edition_name(name: str, edition: int) -> str:
    """Returns a file's name in an edition: `adapters.safetensors`, `adapters.1.safetensors`, ..."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{edition}.{suffix}" if edition else name
