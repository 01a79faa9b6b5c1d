"""The router folder in memory: the answers prepared with it, as a Runtime prepares its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlp_edge.bundle.files import TOKENIZER
from dlp_edge.bundle.manifest import RouterManifest
from dlp_edge.bundle.router_folder import open_router_folder
from dlp_edge.errors import UsageError
from dlp_edge.front.fusion_name import on_grid
from dlp_edge.runtime.decoding.answer import Answer, Vocabulary
from dlp_edge.runtime.decoding.request_answers import RequestAnswers
from dlp_edge.runtime.options import Adapters, GenerateOptions
from dlp_edge.runtime.request import RequestOptions, parse_options, with_one_seed
from dlp_edge.runtime.request_plan import plan_requests
from dlp_edge.runtime.routing.policy import load_router, load_splitter, policy_for
from dlp_edge.runtime.routing.request_splitter import RequestSplitter
from dlp_edge.runtime.routing.router import Router
from dlp_edge.runtime.text.prompt import PromptEncoder, last_user_text, to_messages
from dlp_edge.types import Message, RouteDecision
from dlp_edge.untrusted.chat_template import ChatTemplate

ROUTER_FOLDER = "router"  # in the exported folder


@dataclass(frozen=True)
class RoutedSkills:
    """What routes and words requests to a backbone that runs elsewhere.

    Attributes:
        room: tokens of prompt and answer together.
    """

    manifest: RouterManifest
    encoder: PromptEncoder
    vocabulary: Vocabulary
    router: Router | None
    splitter: RequestSplitter | None
    room: int

    @classmethod
    def load(cls, folder: Path, max_context: int) -> RoutedSkills:
        """Loads the router folder of an export.

        Raises:
            BundleError: it is missing or damaged.
        """
        files = open_router_folder(folder / ROUTER_FOLDER)
        entry = files.manifest.backbone
        tokenizer = files.tokenizer(TOKENIZER)
        router = load_router(files)
        return cls(
            files.manifest,
            PromptEncoder(ChatTemplate(files.manifest.chat_template), tokenizer, entry),
            Vocabulary(tokenizer, entry.vocab_size, frozenset(entry.eos_token_ids)),
            router,
            load_splitter(files, router),
            min(max_context, entry.context_length),
        )

    def parse(self, options: GenerateOptions) -> RequestOptions:
        """A request's options; its weights, pinned or routed, lie on the grid.

        Raises:
            UsageError: an option is unknown or wrong.
        """
        parsed = parse_options({**options, "on_route": self._on_grid}, self.manifest)
        pinned = parsed.routing.pinned
        if pinned is None:
            return parsed
        most = self.manifest.max_skills
        if len(pinned) > most:
            raise UsageError(f"{len(pinned)} adapters are pinned", f"Pin {most} at most here")
        pinned = on_grid(pinned, most)
        return replace(parsed, routing=replace(parsed.routing, pinned=pinned))

    def prepare(
        self, messages: Sequence[Message], options: RequestOptions
    ) -> Answer | RequestAnswers:
        """An answer that has not begun yet; several where the prompt holds several requests.

        Raises:
            UsageError: the messages are malformed, or a router is asked for and there is none.
            ContextLengthError: the prompt is longer than the context.
        """
        planned = plan_requests(self.splitter, to_messages(messages), options)
        if planned is None:
            return self._answer(messages, options)
        requests, history = planned
        options = with_one_seed(options)
        return RequestAnswers(requests, history, lambda said: self._answer(said, options))

    def _answer(self, messages: Sequence[Message], options: RequestOptions) -> Answer:
        policy = policy_for(options.routing, self.router, self.manifest)
        checked = to_messages(messages)
        ids = self.encoder.prompt_ids(checked, self.room)
        text = last_user_text(checked)
        return Answer(self.vocabulary, ids, text, options.decoding, policy, self.room)

    def _on_grid(self, decision: RouteDecision, generated: str) -> Adapters:
        return on_grid(decision.weights, self.manifest.max_skills)
