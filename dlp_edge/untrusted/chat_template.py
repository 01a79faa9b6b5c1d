"""Renders a bundle's chat template: messages to prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError

from dlp_edge.errors import BundleError, UsageError
from dlp_edge.types import Message
from dlp_edge.untrusted.template_budget import HostileTemplateError
from dlp_edge.untrusted.template_sandbox import MAX_SOURCE, SandboxedEnvironment, render

_PROBE: list[Message] = [{"role": "user", "content": "Hello"}]


class ChatTemplate:
    """A Jinja chat template, rendered in a sandbox.

    Without a source (a backbone without a template) the prompt is the last message's content.

    Attributes:
        reads_tools: whether the template uses the variable `tools`.
    """

    def __init__(self, source: str | None) -> None:
        self.is_plain = source is None
        self.reads_tools = False
        self._template = None
        if source is None:
            return
        try:
            if len(source) > MAX_SOURCE:
                raise TemplateError(f"{len(source)} characters, the limit is {MAX_SOURCE}")
            environment = SandboxedEnvironment()
            parsed = environment.parse(source)
            self.reads_tools = any(name.name == "tools" for name in parsed.find_all(nodes.Name))
            self._template = environment.from_string(parsed)
        except Exception as error:  # Jinja's output can also fail in Python's compiler
            raise BundleError(
                f"the bundle's chat template is invalid ({str(error)[:300]})",
                "Export the bundle with another template",
            ) from error
        with contextlib.suppress(UsageError):  # it may require other messages
            self.render(_PROBE)  # refuses endless templates while loading

    def render(
        self,
        messages: Sequence[Message],
        bos: str = "",
        eos: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Renders the prompt for these messages, up to the start of the assistant's turn.

        Raises:
            UsageError: the template refuses the messages.
            BundleError: the template exceeds its budget or touches a forbidden attribute.
        """
        if self._template is None:
            return str(messages[-1]["content"])
        try:
            return render(
                self._template,
                messages=list(messages),
                **({"tools": list(tools)} if tools else {}),
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=eos,
            )
        except (HostileTemplateError, SecurityError, RecursionError, MemoryError) as error:
            raise BundleError(
                f"the bundle's chat template is unsafe ({str(error)[:300]})",
                "Export the bundle with another template",
            ) from error
        except Exception as error:  # templates can raise any exception
            raise UsageError(
                f"the chat template rejects these messages ({str(error)[:300]})",
                "Change their roles or order",
            ) from error
