"""A bundle's chat template: from messages to the prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError

from dlp_edge.errors import BundleError, UsageError
from dlp_edge.types import Message
from dlp_edge.untrusted.template_sandbox import (
    MAX_SOURCE,
    HostileTemplateError,
    SandboxedEnvironment,
    render,
)

_PROBE: list[Message] = [{"role": "user", "content": "Hello"}]


class ChatTemplate:
    """A Jinja chat template, rendered in a sandbox.

    `source` None stands for a backbone without a template: the last user message as it is.
    """

    def __init__(self, source: str | None) -> None:
        self.is_plain = source is None
        self._template = None
        if source is None:
            return
        try:
            if len(source) > MAX_SOURCE:
                raise TemplateError(f"it has {len(source)} characters")
            self._template = SandboxedEnvironment().from_string(source)
        except Exception as error:  # what Jinja makes of a text can fail in Python's compiler, too
            raise BundleError(
                f"the bundle's chat template is not valid ({str(error)[:300]})",
                "Export the bundle with another one",
            ) from error
        with contextlib.suppress(UsageError):  # it may want other messages
            self.render(_PROBE)  # what has no end is refused before anyone waits for it

    def render(self, messages: Sequence[Message], bos: str = "", eos: str = "") -> str:
        """The prompt for these messages, ending where the assistant begins.

        Raises:
            UsageError: the template refuses the messages.
            BundleError: it takes or makes too much, or reaches for what is none of its business.
        """
        if self._template is None:
            return messages[-1]["content"]
        try:
            return render(
                self._template,
                messages=list(messages),
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=eos,
            )
        except (HostileTemplateError, SecurityError, RecursionError, MemoryError) as error:
            raise BundleError(
                f"the bundle's chat template is not harmless ({str(error)[:300]})",
                "Export the bundle with another one",
            ) from error
        except Exception as error:  # a template can fail in any way that Python can
            raise UsageError(
                f"the chat template refuses these messages ({str(error)[:300]})",
                "Change their roles or order",
            ) from error
