"""The LoRA resolver that vLLM asks for a model name that it does not know."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dlp_edge_vllm.store import FusionStore

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

SKILLS = "DLP_EDGE_SKILLS"
FUSIONS = "DLP_EDGE_FUSIONS"
MAX_FUSIONS = "DLP_EDGE_MAX_FUSIONS"
MAX_RANK = "DLP_EDGE_MAX_RANK"
DEFAULT_MAX_FUSIONS = 2000
DEFAULT_MAX_RANK = 512  # vLLM's own largest

_log = logging.getLogger("vllm.dlp_edge")


def register() -> None:
    """Called by vLLM in each of its processes; does nothing where no skills are named."""
    skills, fusions = os.environ.get(SKILLS), os.environ.get(FUSIONS)
    if not skills or not fusions:
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    store = FusionStore(
        Path(skills),
        Path(fusions),
        int(os.environ.get(MAX_FUSIONS, DEFAULT_MAX_FUSIONS)),
        int(os.environ.get(MAX_RANK, DEFAULT_MAX_RANK)),
    )

    class FusionResolver(LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            try:
                folder = await asyncio.to_thread(store.folder_of, lora_name)
            except (OSError, ValueError) as error:
                _log.error("the fusion %.200r cannot be made: %s", lora_name, error)
                return None
            # vLLM gives it an id of its own.
            return None if folder is None else LoRARequest(lora_name, 1, str(folder))

    LoRAResolverRegistry.register_resolver("dlp-edge fusions", FusionResolver())
