"""Many threads at one Runtime, some of them impatient."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import psutil

from dlp_edge import Runtime


def hammer(
    runtime: Runtime,
    prompts: Sequence[tuple[str, dict[str, Any]]],
    threads: int,
    requests: int,
) -> tuple[list[str], list[int]]:
    """Lets every thread make so many requests, a third of them cancelled on the way.

    Returns:
        what was wrong (answers other than the same request gives alone), and the resident bytes
        after every request.
    """
    alone = {prompt: runtime.generate(prompt, **options).text for prompt, options in prompts}
    wrong: list[str] = []
    memory: list[int] = []
    process = psutil.Process()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(requests):
            prompt, options = chance.choice(prompts)
            text, stop_at = "", chance.randrange(3 * len(alone[prompt]))
            stream = runtime.stream(prompt, **options)
            for chunk in stream:
                text += chunk.text
                if len(text) > stop_at:
                    stream.cancel()
            reply = stream.reply
            whole = reply.finish_reason != "cancelled"
            right = alone[prompt] == text if whole else alone[prompt].startswith(text)
            if not right or reply.text != text:
                wrong.append(f"{prompt!r}: {text!r} instead of {alone[prompt]!r}")
            memory.append(process.memory_info().rss)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong, memory
