"""What the kept bundles answer; imports no torch."""

from __future__ import annotations

from pathlib import Path

from dlp_edge import Runtime

PROMPTS = ("Count 3 and 4", "Greet Ann", "Count the days and greet Bob")


def answers(bundle: Path) -> list[dict[str, object]]:
    """What a bundle of these skills says: the router's probabilities, and a short answer of both
    adapters with the log probabilities of its tokens."""
    found: list[dict[str, object]] = []
    with Runtime(bundle, threads=1) as runtime:
        for prompt in PROMPTS:
            decision = runtime.route(prompt)
            reply = runtime.generate(
                prompt, adapters={"count": 0.6, "greet": 0.4}, max_new_tokens=8, logprobs=3
            )
            found.append(
                {
                    "prompt": prompt,
                    "probabilities": decision.probabilities,
                    "text": reply.text,
                    "logprobs": [token.logprob for token in reply.tokens],
                }
            )
    return found
