"""A bundle in memory: its parts, and the answers that are prepared with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlp_edge.bundle import bundle as files
from dlp_edge.bundle.adapter_stack import AdapterStack, converted
from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.errors import BundleError, ContextLengthError, UsageError
from dlp_edge.runtime.decoding.answer import Answer, Vocabulary
from dlp_edge.runtime.decoding.loop import Engine, make_engine
from dlp_edge.runtime.decoding.scoring import log_likelihoods
from dlp_edge.runtime.engine.backbone import Backbone, open_backbone
from dlp_edge.runtime.engine.device import Device
from dlp_edge.runtime.engine.ort_errors import ANSWERING, memory_for
from dlp_edge.runtime.fusion.copying import parse_weights
from dlp_edge.runtime.memory import check_address_space, check_memory
from dlp_edge.runtime.options import GenerateOptions, check_option_names, decoding_of
from dlp_edge.runtime.routing.policy import Pinned, Steering, check_routing, load_router, route_with
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.session_caches import SessionCaches
from dlp_edge.runtime.text.prompt import check_prompt, last_user_text, to_messages
from dlp_edge.types import Likelihood, Message
from dlp_edge.untrusted.chat_template import ChatTemplate

if TYPE_CHECKING:
    from typing_extensions import Unpack

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Loaded:
    """One edition of a bundle. A request keeps to the one that it was prepared with."""

    manifest: Manifest
    template: ChatTemplate
    router: Router | None
    backbone: Backbone
    stack: AdapterStack
    vocabulary: Vocabulary
    engine: Engine
    caches: SessionCaches

    @memory_for(ANSWERING)
    def prepare(self, prompt: str | Sequence[Message], options: GenerateOptions) -> Answer:
        """An answer that has not begun yet; everything about the request is checked here.

        Raises:
            UsageError: an option or adapter name is wrong, or the prompt is empty.
            ContextLengthError: the prompt is longer than the context.
            ResourceError: memory ran out.
        """
        check_option_names(options)
        messages = to_messages(prompt)
        steering = self._steering(**options)
        ids = self._encode(self._render(messages))
        if not ids:
            raise UsageError("the chat template makes an empty prompt of this", "Give it some text")
        room = self.engine.decoder.max_context
        if len(ids) >= room:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, the context holds {room} with the answer",
                "Shorten the prompt, or load the bundle with a larger max_context",
            )
        user_text, decoding = last_user_text(messages), decoding_of(**options)
        return Answer(self.vocabulary, ids, user_text, decoding, steering, room)

    def score(
        self,
        prompt: str | Sequence[Message],
        continuations: Sequence[str],
        ends: bool,
        options: GenerateOptions,
    ) -> list[Likelihood]:
        """See `Runtime.score`; uses the engine."""
        check_option_names(options)
        if isinstance(continuations, (str, bytes)):
            raise UsageError("the continuations are one text", "Give a list of texts")
        for text in continuations:
            check_prompt(text)
        messages = to_messages(prompt)
        steering = self._steering(**options)
        rendered = self._render(messages)
        asked = self._encode(rendered)
        wholes = [self._encode(rendered + text) for text in continuations]
        longest = max(map(len, wholes), default=0)
        if longest > self.engine.decoder.max_context:
            raise ContextLengthError(
                f"prompt and continuation have {longest} tokens, the context holds "
                f"{self.engine.decoder.max_context}",
                "Shorten them, or load the bundle with a larger max_context",
            )
        fusion = steering.weights_for(last_user_text(messages))
        end_ids = sorted(self.vocabulary.eos_token_ids) if ends else []
        found = log_likelihoods(self.engine, asked, wholes, fusion, end_ids)
        return [
            Likelihood(text, logprob, count)
            for text, (logprob, count) in zip(continuations, found, strict=True)
        ]

    def count_tokens(self, text: str) -> int:
        """Tokens of a text alone, without the chat template."""
        return len(self.vocabulary.tokenizer.encode(text, add_special_tokens=False).ids)

    def _render(self, messages: Sequence[Message]) -> str:
        backbone = self.manifest.backbone
        return self.template.render(messages, backbone.bos_token, backbone.eos_token)

    def _encode(self, rendered: str) -> list[int]:
        """The ids of a text that the template made. Raises BundleError for one that is too high."""
        check_address_space()
        tokenizer = self.vocabulary.tokenizer
        ids: list[int] = tokenizer.encode(rendered, add_special_tokens=self.template.is_plain).ids
        known = self.manifest.backbone.vocab_size
        if max(ids, default=0) >= known:
            raise BundleError(
                f"the tokenizer gives the id {max(ids)}, the backbone knows {known}",
                "Export the bundle again",
            )
        return ids

    def with_edition(self, bundle: Bundle) -> Loaded:
        """The same backbone with another edition's adapters and router; engines are made anew."""
        router = self.router
        if router is not None and bundle.manifest.router is not None:
            router = router.with_head(bundle.router_head(), bundle.manifest.router.settings)
        return _assemble(
            bundle.manifest,
            bundle.adapters(),
            self.template,
            router,
            self.backbone,
            self.vocabulary,
            self.engine.decoder.max_context,
            self.caches.budget,
        )

    def _steering(self, **options: Unpack[GenerateOptions]) -> Steering:
        pinned = options.get("adapters")
        names = [entry.name for entry in self.manifest.adapters]
        if pinned is not None or not names:
            check_routing(self.manifest, **options)
            return Pinned(parse_weights(pinned or {}, names))
        return route_with(self.router, self.manifest, **options)


def read(
    bundle: Bundle, device: Device, max_context: int, cache_budget: int | None, tell: Progress
) -> Loaded:
    """Loads and checks all parts of a bundle; `tell` is called with (stage, fraction).

    Raises:
        BundleError, DeviceError, ResourceError: see `Runtime`.
        MemoryError: there is no room for it.
    """
    entry = bundle.manifest.backbone
    stack = bundle.adapters()
    model, graph = bundle.graph()
    check_memory(bundle)
    template = ChatTemplate(bundle.manifest.chat_template)
    tell("tokenizer", 0.05)
    tokenizer = bundle.tokenizer(files.TOKENIZER)
    vocabulary = Vocabulary(tokenizer, entry.vocab_size, frozenset(entry.eos_token_ids))
    tell("router", 0.15)
    router = load_router(bundle)
    tell("checksums", 0.2)
    weights = bundle.weights(graph, lambda part: tell("checksums", 0.2 + 0.3 * part))
    tell("backbone", 0.5)
    path = bundle.path(files.BACKBONE)
    backbone = open_backbone(path, entry, device, model, weights, lambda: bundle.weights(graph))
    room = min(max_context, entry.context_length)
    return _assemble(
        bundle.manifest, stack, template, router, backbone, vocabulary, room, cache_budget
    )


def _assemble(
    manifest: Manifest,
    stack: AdapterStack,
    template: ChatTemplate,
    router: Router | None,
    backbone: Backbone,
    vocabulary: Vocabulary,
    max_context: int,
    cache_budget: int | None,
) -> Loaded:
    """Engines over the bundle's adapters, beside its other parts."""
    if backbone.custom_operators:
        stack = converted(stack, "float16")  # as they are read; the rest is given back
    engine = make_engine(backbone, stack, max_context)
    caches = SessionCaches(
        lambda: make_engine(backbone, stack, max_context, reuse=True, beside=engine), cache_budget
    )
    return Loaded(manifest, template, router, backbone, stack, vocabulary, engine, caches)
