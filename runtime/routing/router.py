"""The router: classifies text by the adapter that should answer it (on the CPU)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from dlp_edge.bundle.graph_allowlist import CheckLength
from dlp_edge.bundle.manifest import RouterSettings
from dlp_edge.bundle.router_head import RouterHead
from dlp_edge.errors import RouterError
from dlp_edge.native_calls import native_calls
from dlp_edge.runtime.engine.ort_errors import first_line, is_out_of_memory
from dlp_edge.runtime.routing.router_input import RouterInputEncoder, check_settings
from dlp_edge.runtime.routing.small_session import open_small

# Several requests are answered in order: if no adapter exceeds SURE, prefer a plausible one
# (>= RIVAL x best) that the prompt's opening (PREFIX_LENGTHS tokens) clearly (>= CLEAR) asks for.
PREFIX_LENGTHS = (32, 48)
SURE = 0.9
RIVAL = 0.1
CLEAR = 0.85


@dataclass(frozen=True)
class Classification:
    """The router's output for a text.

    Attributes:
        probabilities: y = softmax(z / temperature) over the adapters; they sum to 1.
        doubt: the probability that the text is out of scope.
    """

    probabilities: dict[str, float]
    doubt: float


class Router:
    """A trained router.

    Args:
        model: the bytes of router.onnx: input_ids [1, L] int64 -> features [1, F] float32.
        head: the last layer: one row for each label, then the out-of-scope rows.
        tokenizer: the router's own (router_tokenizer.json).
        settings: labels, input lengths and temperature.
        check_length: raises ValueError for a number of tokens that the graph may not be run with.

    Raises:
        RouterError: the parts do not load or do not fit together.
        MemoryError: not enough memory.
    """

    def __init__(
        self,
        model: bytes,
        head: RouterHead,
        tokenizer: Tokenizer,
        settings: RouterSettings,
        check_length: CheckLength | None = None,
    ) -> None:
        check_settings(settings)
        if len(settings.labels) > len(head.bias):
            raise RouterError(
                f"the router has {len(head.bias)} outputs for {len(settings.labels)} labels",
                "Export the bundle again",
            )
        try:
            self._session = open_small(model)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            if is_out_of_memory(error):
                raise MemoryError(first_line(error)) from error
            raise RouterError(
                f"cannot load the router's model ({error})", "Export the bundle again"
            ) from error
        self.tokenizer = tokenizer
        self._encoder = RouterInputEncoder(tokenizer, settings)
        self._settings = settings
        self._head = head
        self._check_length = check_length
        self.classify("")  # fails early if graph, tokenizer and last layer do not match

    @property
    def labels(self) -> tuple[str, ...]:
        return self._settings.labels

    @property
    def head(self) -> RouterHead:
        return self._head

    @property
    def settings(self) -> RouterSettings:
        return self._settings

    def with_head(self, head: RouterHead, settings: RouterSettings) -> Router:
        """A router with another last layer that shares this one's session."""
        other = object.__new__(Router)
        other._session, other._encoder = self._session, self._encoder
        other.tokenizer, other._check_length = self.tokenizer, self._check_length
        other._head, other._settings = head, settings
        return other

    def classify(self, prompt: str, generated: str = "") -> Classification:
        """Estimate which adapter should write the next sentence.

        Args:
            prompt: the user's text.
            generated: the answer so far, up to and including the new sentence's first token;
                empty for the first sentence.

        Raises:
            RouterError: the graph fails to run, or its output is invalid.
            MemoryError: not enough memory.
        """
        shares, doubt = self._shares(self._encoder.encode(prompt, generated))
        if not generated and len(shares) > 1 and shares.max() <= SURE:
            self._prefer_opening(shares, prompt)
        return Classification(dict(zip(self.labels, shares.tolist(), strict=True)), doubt)

    def _shares(self, ids: list[int]) -> tuple[npt.NDArray[np.float64], float]:
        """The adapters' probabilities [N], given that the text is in scope, and the doubt."""
        z = self._head.scores(self._features(ids)[None])[0]
        y = _softmax(z / self._settings.temperature)
        own = y[: len(self.labels)]
        shares = own / own.sum() if own.sum() > 0 else np.full(len(own), 1 / max(1, len(own)))
        return shares, float(y[len(self.labels) :].sum())

    def _prefer_opening(self, shares: npt.NDArray[np.float64], prompt: str) -> None:
        """Swap the best adapter's probability with that of the prompt's opening (see SURE)."""
        best = int(shares.argmax())
        for ids in self._encoder.encode_prefixes(prompt, PREFIX_LENGTHS):
            opening, doubt = self._shares(ids)
            first = int(opening.argmax())
            if opening[first] * (1 - doubt) >= CLEAR and shares[first] >= RIVAL * shares[best]:
                shares[[first, best]] = shares[[best, first]]
                return

    def features(self, prompt: str, generated: str = "") -> npt.NDArray[np.float32]:
        """The last layer's input for a text, [F]."""
        return self._features(self._encoder.encode(prompt, generated))

    def _features(self, ids: list[int]) -> npt.NDArray[np.float32]:
        try:
            if self._check_length is not None:
                self._check_length(len(ids))
            with native_calls:
                (output,) = self._session.run(
                    ["features"], {"input_ids": np.array([ids], np.int64)}
                )
        except Exception as error:  # onnxruntime's exceptions have no common base class
            if is_out_of_memory(error):
                raise MemoryError(first_line(error)) from error
            raise RouterError(
                f"the router's model failed to run ({error})",
                "It is damaged or does not match its tokenizer: export the bundle again",
            ) from error
        features = np.asarray(output, np.float32)
        width = self._head.weight.shape[1]
        if features.shape != (1, width):
            raise RouterError(
                f"the router's graph has {features.shape[-1]} features, its last layer expects "
                f"{width}",
                "Export the bundle again",
            )
        if not np.isfinite(features).all():
            raise RouterError("the router's output is not finite", "Train the router again")
        row: npt.NDArray[np.float32] = features[0]
        return row


def _softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    exponentials = np.exp(z - z.max())
    normalised: npt.NDArray[np.float64] = exponentials / exponentials.sum()
    return normalised
