"""The launch file of an export, and the page that explains it."""

from __future__ import annotations

from dlp_edge.export.vllm.capacity import MAX_CPU_LORAS, MAX_LORAS, Capacity

SCRIPT = "serve.sh"
PAGE = "serve.md"

_SCRIPT = """#!/bin/sh
# Starts vLLM with this folder's model and skills; {page} says more. Arguments are vLLM's.
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
# Lets the plugin dlp-edge-vllm load a fusion when it is first named. vLLM then also has endpoints
# that load any folder: keep its port from everybody but the front.
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1
export DLP_EDGE_SKILLS="$here/skills"
export DLP_EDGE_FUSIONS="${{DLP_EDGE_FUSIONS:-$here/fusions}}"
export DLP_EDGE_MAX_RANK={rank}
exec "${{PYTHON:-python3}}" -m vllm.entrypoints.openai.api_server \\
    --model "$here/model" --served-model-name base \\
    --enable-lora --max-lora-rank {lora_rank} \\
    --max-loras "${{MAX_LORAS:-{max_loras}}}" \\
    --max-cpu-loras "${{MAX_CPU_LORAS:-{max_cpu_loras}}}" \\
    --max-model-len "${{MAX_CONTEXT:-{context}}}" \\
    --host "${{HOST:-127.0.0.1}}" --port "${{PORT:-8000}}" "$@"
"""

_PAGE = """# {name} on vLLM

    pip install vllm dlp-edge-vllm        # the plugin: integrations/vllm of dlp-edge
    ./{script}                            # PORT=8000, or further servers on further ports
    dlp-edge front . --upstream http://127.0.0.1:8000

Clients talk to the front, as they do to `dlp-edge serve`. vLLM's own port stays private: its
endpoints for loading adapters read any folder.

| part | what it is |
|---|---|
| `model/` | the backbone ({name}) in its own type, tokenizer and chat template |
| `skills/` | the skills as PEFT folders: {skills} |
| `router/` | all that the front needs: router, tokenizers, `routing.json` |
| `{script}` | starts vLLM; further arguments are vLLM's, such as `--dtype float32` |
| `fusions/` | appears with the first fusion; remove it only while vLLM is down |

| flag | value | why |
|---|---|---|
| `--max-lora-rank` | {lora_rank} | a fusion has at most {max_skills} skills, {rank} ranks in all |
| `--max-loras` | {max_loras} | of one batch, MAX_LORAS; each takes {megabytes:.1f} MB in 16 bits |
| `--max-cpu-loras` | {max_cpu_loras} | kept in memory, MAX_CPU_LORAS; others are read again |
| `--max-model-len` | {context} | MAX_CONTEXT; give `dlp-edge front --max-context` the same |
"""
DEFAULT_CONTEXT = 4096


def script(capacity: Capacity, context_length: int) -> str:
    """The text of SCRIPT."""
    return _SCRIPT.format(
        page=PAGE,
        rank=capacity.max_rank,
        lora_rank=capacity.lora_rank,
        max_loras=MAX_LORAS,
        max_cpu_loras=MAX_CPU_LORAS,
        context=min(DEFAULT_CONTEXT, context_length),
    )


def page(name: str, skills: list[str], capacity: Capacity, context_length: int) -> str:
    """The text of PAGE."""
    return _PAGE.format(
        name=name,
        script=SCRIPT,
        skills=", ".join(skills),
        rank=capacity.max_rank,
        lora_rank=capacity.lora_rank,
        max_skills=capacity.max_skills,
        max_loras=MAX_LORAS,
        max_cpu_loras=MAX_CPU_LORAS,
        megabytes=capacity.lora_bytes / 1e6,
        context=min(DEFAULT_CONTEXT, context_length),
    )
