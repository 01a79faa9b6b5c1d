"""A bundle in memory: its parts, and the answers prepared with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dlp_edge.bundle import files
from dlp_edge.bundle.adapter_stack import AdapterStack, converted
from dlp_edge.bundle.bundle import Bundle
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.errors import BundleError, ContextLengthError, DeviceError, UsageError
from dlp_edge.runtime.decoding.answer import Answer, Vocabulary
from dlp_edge.runtime.decoding.engine import Engine, captures_are_right, make_engine
from dlp_edge.runtime.decoding.loop import run_batch
from dlp_edge.runtime.decoding.request_answers import RequestAnswers
from dlp_edge.runtime.decoding.scoring import log_likelihoods
from dlp_edge.runtime.decoding.tool_calls import AnswerTools
from dlp_edge.runtime.engine.backbone import Backbone, open_backbone
from dlp_edge.runtime.engine.device import Device, choose_device, fallback_device
from dlp_edge.runtime.engine.interrupt import Interrupt
from dlp_edge.runtime.engine.ort_errors import ANSWERING, memory_for
from dlp_edge.runtime.engine.prefix_cache import PrefixCache
from dlp_edge.runtime.memory import (
    CacheBudgets,
    available,
    cache_bytes,
    check_address_space,
    check_memory,
    device_bytes,
)
from dlp_edge.runtime.request import RequestOptions, with_one_seed
from dlp_edge.runtime.request_plan import plan_requests, route_requests
from dlp_edge.runtime.routing.policy import load_router, load_splitter, policy_for
from dlp_edge.runtime.routing.request_splitter import RequestSplitter
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.session_caches import SessionCaches
from dlp_edge.runtime.text.prompt import (
    PromptEncoder,
    check_length,
    check_prompt,
    last_user_text,
    to_messages,
)
from dlp_edge.runtime.text.tokenizer import TextTokenizer
from dlp_edge.types import AdapterInfo, Likelihood, Message, Request
from dlp_edge.untrusted.chat_template import ChatTemplate

_log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
MAX_ROWS_OF_A_DEVICE = 8  # whose memory is taken whole, not as it is used
MAX_SIDE_BY_SIDE = 8  # requests of one prompt; the others begin as these end


@dataclass(frozen=True)
class LoadedBundle:
    """One edition of a bundle. A request keeps to the one that it was prepared with."""

    manifest: Manifest
    encoder: PromptEncoder
    router: Router | None
    backbone: Backbone
    stack: AdapterStack
    splitter: RequestSplitter | None
    vocabulary: Vocabulary
    engine: Engine
    caches: SessionCaches
    budgets: CacheBudgets

    @memory_for(ANSWERING)
    def prepare(self, prompt: str | Sequence[Message], options: RequestOptions) -> Answer:
        """An answer that has not begun yet.

        Raises:
            UsageError: the prompt is empty, or a router is asked for and the bundle has none.
            ContextLengthError: the prompt is longer than the context.
            ResourceError: memory ran out.
        """
        policy = policy_for(options.routing, self.router, self.manifest)
        messages = to_messages(prompt)
        user_text = last_user_text(messages)
        check_address_space()
        room = self.engine.decoder.max_context
        use = options.tools
        if options.raw:
            ids = self.encoder.raw_ids(prompt, room)
        else:
            ids = self.encoder.prompt_ids(messages, room, () if use is None else use.tools)
        tools = None if use is None else AnswerTools(use, self.encoder.call_format)
        return Answer(self.vocabulary, ids, user_text, options.decoding, policy, room, tools)

    @memory_for(ANSWERING)
    def prepare_stream(
        self, prompt: str | Sequence[Message], options: RequestOptions
    ) -> Answer | RequestAnswers:
        """As `prepare`; several answers where the prompt holds several requests, and the options
        ask for each to be answered on its own."""
        planned = plan_requests(self.splitter, to_messages(prompt), options)
        if planned is None:
            return self.prepare(prompt, options)
        requests, history = planned
        options = with_one_seed(options)
        return RequestAnswers(requests, history, lambda said: self.prepare(said, options))

    def pool(self, rows: int) -> Engine:
        """An engine of several sequences, as many as fit into half of the free memory."""
        size = cache_bytes(self.backbone.entry, self.engine.decoder.max_context)
        if self.backbone.device.kind != "cpu":
            rows = min(rows, MAX_ROWS_OF_A_DEVICE)
        rows = max(1, min(rows, available() // 2 // size))
        room, prefixes = self.engine.decoder.max_context, self.engine.prefixes
        return make_engine(
            self.backbone, self.stack, room, rows, beside=self.engine, prefixes=prefixes
        )

    def requests(self, prompt: str, options: RequestOptions) -> tuple[Request, ...]:
        """See `Runtime.requests`."""
        policy = policy_for(options.routing, self.router, self.manifest)
        return route_requests(self.splitter, prompt, lambda asked: policy.at_prompt(asked).decision)

    def run_batch(self, answers: Sequence[Answer], max_batch: int, interrupt: Interrupt) -> None:
        """Generates prepared answers in one batch, on an engine of its own beside `engine`."""
        room = max(len(answer.prompt_ids) + answer.limit for answer in answers)
        sequences = min(max_batch, len(answers))
        engine = make_engine(self.backbone, self.stack, room, sequences, beside=self.engine)
        run_batch(engine, answers, interrupt)

    def score(
        self,
        prompt: str | Sequence[Message],
        continuations: Sequence[str],
        ends: bool,
        options: RequestOptions,
    ) -> list[Likelihood]:
        """See `Runtime.score`; uses the engine."""
        if isinstance(continuations, (str, bytes)):
            raise UsageError("the continuations are one text", "Give a list of texts")
        for text in continuations:
            check_prompt(text)
        messages = to_messages(prompt)
        policy = policy_for(options.routing, self.router, self.manifest)
        check_address_space()
        room = self.engine.decoder.max_context
        check_length(sum(len(message["content"]) for message in messages), room)
        rendered = self.encoder.render(messages)
        asked = self.encoder.encode(rendered, room)
        literal = self.encoder.literal
        wholes = [self.encoder.encode(rendered + literal(text), room) for text in continuations]
        longest = max(map(len, wholes), default=0)
        if longest > room:
            raise ContextLengthError(
                f"prompt and continuation have {longest} tokens, the context holds {room}",
                "Shorten them, or load the bundle with a larger max_context",
            )
        fusion = policy.at_prompt(last_user_text(messages)).weights
        end_ids = sorted(self.vocabulary.eos_token_ids) if ends else []
        likelihoods = log_likelihoods(self.engine, asked, wholes, fusion, end_ids)
        return [
            Likelihood(text, logprob, count)
            for text, (logprob, count) in zip(continuations, likelihoods, strict=True)
        ]

    @property
    def tokenizer(self) -> TextTokenizer:
        """See `Runtime.tokenizer`."""
        return TextTokenizer(self.encoder, self.engine.decoder.max_context)

    def with_edition(self, bundle: Bundle) -> LoadedBundle:
        """The same backbone with another edition's adapters and router; engines are made anew."""
        router = self.router
        if router is not None and bundle.manifest.router is not None:
            router = router.with_head(bundle.router_head(), bundle.manifest.router.settings)
        return _assemble(
            bundle.manifest,
            bundle.adapters(),
            self.encoder,
            router,
            self.splitter,
            self.backbone,
            self.vocabulary,
            self.engine.decoder.max_context,
            self.budgets,
        )


def adapter_infos(manifest: Manifest) -> tuple[AdapterInfo, ...]:
    """What an application may know of the adapters, in the manifest's order."""
    labels = manifest.router.settings.labels if manifest.router else ()
    return tuple(
        AdapterInfo(entry.name, entry.rank, entry.target_modules, entry.name in labels)
        for entry in manifest.adapters
    )


def load_on(
    requested: str,
    bundle: Bundle,
    threads: int | None,
    max_context: int,
    budgets: CacheBudgets,
    on_progress: Progress,
) -> LoadedBundle:
    """Loads a bundle on the device requested ("auto" chooses one); see `load`."""
    manifest = bundle.manifest
    needed = device_bytes(manifest, max_context)
    device = choose_device(requested, manifest.target, threads, needed)
    try:
        return load(bundle, device, max_context, budgets, on_progress)
    except (BundleError, DeviceError) as error:
        device = fallback_device(requested, device, manifest.target, error)
    return load(bundle, device, max_context, budgets, on_progress)


def load(
    bundle: Bundle,
    device: Device,
    max_context: int,
    budgets: CacheBudgets,
    on_progress: Progress,
) -> LoadedBundle:
    """Loads and checks all parts of a bundle; `on_progress` is called with (stage, fraction).

    Raises:
        BundleError, DeviceError, ResourceError: see `Runtime`.
        MemoryError: there is no room for it.
    """
    entry = bundle.manifest.backbone
    stack = bundle.adapters()
    model, graph = bundle.graph()
    check_memory(bundle)
    template = ChatTemplate(bundle.manifest.chat_template)
    on_progress("tokenizer", 0.05)
    tokenizer = bundle.tokenizer(files.TOKENIZER)
    encoder = PromptEncoder(template, tokenizer, entry)
    vocabulary = Vocabulary(tokenizer, entry.vocab_size, frozenset(entry.eos_token_ids))
    on_progress("router", 0.15)
    router = load_router(bundle)
    splitter = load_splitter(bundle, router)
    on_progress("checksums", 0.2)
    weights = bundle.weights(graph, lambda part: on_progress("checksums", 0.2 + 0.3 * part))
    on_progress("backbone", 0.5)
    path = bundle.path(files.BACKBONE)
    backbone = open_backbone(path, entry, device, model, weights, lambda: bundle.weights(graph))
    room = min(max_context, entry.context_length)
    return _assemble(
        bundle.manifest, stack, encoder, router, splitter, backbone, vocabulary, room, budgets
    )


def _assemble(
    manifest: Manifest,
    stack: AdapterStack,
    encoder: PromptEncoder,
    router: Router | None,
    splitter: RequestSplitter | None,
    backbone: Backbone,
    vocabulary: Vocabulary,
    max_context: int,
    budgets: CacheBudgets,
) -> LoadedBundle:
    """Engines over the bundle's adapters, beside its other parts."""
    if backbone.custom_operators:
        stack = converted(stack, "float16")  # as they are read; the rest is given back
    # Other devices' caches cannot be copied in parts.
    keeps = budgets.prefixes and backbone.device.kind == "cpu"
    prefixes = PrefixCache(budgets.prefixes) if keeps else None
    engine = make_engine(backbone, stack, max_context, prefixes=prefixes)
    if backbone.cuda_graphs is not None and not captures_are_right(engine):
        _log.warning("captured CUDA graphs compute something else on this machine: not used")
        backbone = replace(backbone, cuda_graphs=None)
        engine = make_engine(backbone, stack, max_context, beside=engine)

    def make_for_session() -> Engine:
        return make_engine(
            backbone, stack, max_context, reuse=True, beside=engine, prefixes=prefixes
        )

    caches = SessionCaches(make_for_session, budgets.sessions)
    return LoadedBundle(
        manifest, encoder, router, backbone, stack, splitter, vocabulary, engine, caches, budgets
    )
