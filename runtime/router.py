"""The router: which adapter should answer, read from the text at hand (mini-MLP, on the CPU)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from dlp_edge.errors import RouterError
from dlp_edge.manifest import RouterSettings

MAX_WINDOW = 256  # ids that the router reads at most
SEGMENTS = 4  # of the window: prompt, earlier lines, this line, its last tokens
OPENING_TOKENS = 2  # the last tokens of the answer: where the new sentence begins
# Text beyond this many characters a token is not even tokenized; English has 4 to 5.
CHARACTERS_PER_TOKEN = 8


def check_settings(settings: RouterSettings) -> None:
    """Raises RouterError unless a router can work by these settings."""
    if not settings.labels or len(set(settings.labels)) != len(settings.labels):
        raise RouterError(f"the router's labels are {settings.labels!r}", "Name every adapter once")
    least = min(settings.prompt_tokens, settings.generated_tokens - OPENING_TOKENS)
    window = settings.prompt_tokens + settings.generated_tokens + SEGMENTS - 1
    if least < 1 or window > MAX_WINDOW:
        raise RouterError(
            f"the router reads {settings.prompt_tokens} + {settings.generated_tokens} tokens",
            f"Let it read 1 and {OPENING_TOKENS + 1} or more, with {SEGMENTS - 1} separators "
            f"{MAX_WINDOW} at most",
        )
    if not 0 < settings.temperature < float("inf"):
        raise RouterError(
            f"the router's temperature is {settings.temperature}", "Choose a positive number"
        )


class WindowReader:
    """Turns text into the windows of ids that routers read, in training and at run time."""

    def __init__(self, tokenizer: Tokenizer, settings: RouterSettings) -> None:
        self._tokenizer = tokenizer
        self._generated_tokens = settings.generated_tokens
        self._prompt_tokens = settings.prompt_tokens
        # All sentences of an answer share the prompt, which is most of the text to tokenize.
        self._prompt_ids = lru_cache(maxsize=1)(self._head_and_tail)

    def window(self, prompt: str, generated: str) -> list[int]:
        """Four segments of ids with the separator between them.

        prompt | earlier lines of the answer | its running line | its last tokens. The network
        pools each apart, so it can tell what was asked, what is done and what is being begun.
        The separator is the first id beyond the tokenizer's; every window holds three.
        """
        separator = self._tokenizer.get_vocab_size()
        line_start = generated.rstrip().rfind("\n") + 1
        line = self._tail(generated[line_start:], self._generated_tokens)
        earlier = self._tail(generated[:line_start], self._generated_tokens - len(line))
        return [
            *self._prompt_ids(prompt),
            separator,
            *earlier,
            separator,
            *line[:-OPENING_TOKENS],
            separator,
            *line[-OPENING_TOKENS:],
        ]

    def _head_and_tail(self, text: str) -> list[int]:
        """The text's ids; of a long text, those of its beginning and of its end."""
        limit = self._prompt_tokens
        reach = limit * CHARACTERS_PER_TOKEN // 2
        if len(text) > 2 * reach:
            text = text[:reach] + text[-reach:]
        ids = self._encode(text)
        if len(ids) <= limit:
            return ids
        tail = limit // 2
        return ids[: limit - tail] + ids[len(ids) - tail :]

    def _tail(self, text: str, limit: int) -> list[int]:
        """The last `limit` ids of the text."""
        if limit == 0 or not text:
            return []
        return self._encode(text[-limit * CHARACTERS_PER_TOKEN :])[-limit:]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class Router:
    """A trained router, ready to be asked.

    Args:
        model: the bytes of router.onnx: input_ids [1, L] int64 -> logits [1, N] float32.
        tokenizer: the router's own, of router_tokenizer.json.
        settings: what it reads and what its logits mean.
    """

    def __init__(self, model: bytes, tokenizer: Tokenizer, settings: RouterSettings) -> None:
        check_settings(settings)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a call takes a fraction of a millisecond
        options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no base but Exception
            raise RouterError(
                f"the router's model does not load ({error})", "Export the bundle again"
            ) from error
        self._reader = WindowReader(tokenizer, settings)
        self._settings = settings
        self.probabilities("")  # a router that does not fit its tokenizer or labels fails here

    @property
    def labels(self) -> tuple[str, ...]:
        return self._settings.labels

    def probabilities(self, prompt: str, generated: str = "") -> dict[str, float]:
        """y = softmax(z / temperature), adapter name -> probability; they sum to 1.

        Args:
            prompt: the user's text.
            generated: the answer so far, up to and including the first token of the sentence
                that is about to be written; empty at its beginning.
        """
        ids = self._reader.window(prompt, generated)
        y = _softmax(self._logits(ids) / self._settings.temperature)
        return dict(zip(self.labels, y.tolist(), strict=True))

    def _logits(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """Logits [N] of one window."""
        try:
            (output,) = self._session.run(["logits"], {"input_ids": np.array([ids], np.int64)})
        except Exception as error:  # onnxruntime's errors share no base but Exception
            raise RouterError(
                f"the router's model does not run ({error})",
                "Its tokenizer is another router's, or it is damaged: export the bundle again",
            ) from error
        logits = np.asarray(output, np.float64)
        if logits.shape != (1, len(self.labels)):
            raise RouterError(
                f"the router has {logits.shape[-1]} outputs for {len(self.labels)} labels",
                "Export the bundle again",
            )
        if not np.isfinite(logits).all():
            raise RouterError("the router's output is not finite", "Train the router again")
        row: npt.NDArray[np.float64] = logits[0]
        return row


def _softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    exponentials = np.exp(z - z.max())
    normalised: npt.NDArray[np.float64] = exponentials / exponentials.sum()
    return normalised
