"""The router: which adapter should answer, read from the text at hand (mini-MLP, on the CPU)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from dlp_edge.bundle.manifest import RouterSettings
from dlp_edge.bundle.router_head import RouterHead
from dlp_edge.errors import RouterError
from dlp_edge.runtime.engine.ort_errors import first_line, is_out_of_memory
from dlp_edge.runtime.routing.router_input import RouterInputEncoder, check_settings

# A prompt that asks for several skills is answered in its order. Where no skill is SURE and one is
# RIVAL times as likely as the likeliest, and the prompt's first tokens (so many) are CLEAR about
# it, it leads.
PREFIX_LENGTHS = (32, 48)
SURE = 0.9
RIVAL = 0.1
CLEAR = 0.85


@dataclass(frozen=True)
class Classification:
    """What the router thinks of a text.

    Attributes:
        probabilities: y = softmax(z / temperature) over the adapters; they sum to 1.
        doubt: the probability that the text is for none of them.
    """

    probabilities: dict[str, float]
    doubt: float


class Router:
    """A trained router, ready to be asked.

    Args:
        model: the bytes of router.onnx: input_ids [1, L] int64 -> features [1, F] float32.
        head: the last layer, one row for each label and then those of nobody.
        tokenizer: the router's own, of router_tokenizer.json.
        settings: what it reads and what its scores mean.
    """

    def __init__(
        self, model: bytes, head: RouterHead, tokenizer: Tokenizer, settings: RouterSettings
    ) -> None:
        check_settings(settings)
        if len(settings.labels) > len(head.bias):
            raise RouterError(
                f"the router has {len(head.bias)} outputs for {len(settings.labels)} labels",
                "Export the bundle again",
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a call takes a fraction of a millisecond
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no base but Exception
            if is_out_of_memory(error):
                raise MemoryError(first_line(error)) from error
            raise RouterError(
                f"the router's model does not load ({error})", "Export the bundle again"
            ) from error
        self._reader = RouterInputEncoder(tokenizer, settings)
        self._settings = settings
        self._head = head
        self.classify("")  # a router that does not fit its tokenizer or last layer fails here

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
        """A router of the same graph with another last layer; shares the graph's session."""
        other = object.__new__(Router)
        other._session, other._reader = self._session, self._reader
        other._head, other._settings = head, settings
        return other

    def classify(self, prompt: str, generated: str = "") -> Classification:
        """What the text is for.

        Args:
            prompt: the user's text.
            generated: the answer so far, up to and including the first token of the sentence
                that is about to be written; empty at its beginning.
        """
        window = self._reader.encode(prompt, generated)
        shares, doubt = self._shares(window)
        if not generated and len(shares) > 1 and shares.max() <= SURE:
            self._let_lead(shares, prompt)
        return Classification(dict(zip(self.labels, shares.tolist(), strict=True)), doubt)

    def _shares(self, window: list[int]) -> tuple[npt.NDArray[np.float64], float]:
        """The adapters' probabilities [N], given that one is meant, and the doubt."""
        z = self._head.scores(self._features(window)[None])[0]
        y = _softmax(z / self._settings.temperature)
        own = y[: len(self.labels)]
        shares = own / own.sum() if own.sum() > 0 else np.full(len(own), 1 / max(1, len(own)))
        return shares, float(y[len(self.labels) :].sum())

    def _let_lead(self, shares: npt.NDArray[np.float64], prompt: str) -> None:
        """Swaps the likeliest skill's probability with that of the one that the prompt begins
        with, where it clearly begins with another likely one."""
        likeliest = int(shares.argmax())
        for window in self._reader.encode_prefixes(prompt, PREFIX_LENGTHS):
            begun, doubt = self._shares(window)
            first = int(begun.argmax())
            if begun[first] * (1 - doubt) >= CLEAR and shares[first] >= RIVAL * shares[likeliest]:
                shares[[first, likeliest]] = shares[[likeliest, first]]
                return

    def features(self, prompt: str, generated: str = "") -> npt.NDArray[np.float32]:
        """What the last layer reads of a text, [F]."""
        return self._features(self._reader.encode(prompt, generated))

    def _features(self, window: list[int]) -> npt.NDArray[np.float32]:
        try:
            ids = np.array([window], np.int64)
            (output,) = self._session.run(["features"], {"input_ids": ids})
        except Exception as error:  # onnxruntime's errors share no base but Exception
            if is_out_of_memory(error):
                raise MemoryError(first_line(error)) from error
            raise RouterError(
                f"the router's model does not run ({error})",
                "Its tokenizer is another router's, or it is damaged: export the bundle again",
            ) from error
        features = np.asarray(output, np.float32)
        width = self._head.weight.shape[1]
        if features.shape != (1, width):
            raise RouterError(
                f"the router's graph has {features.shape[-1]} features, its last layer reads "
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
