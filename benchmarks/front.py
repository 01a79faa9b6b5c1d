"""What a token costs a front: its CPU time per token, routing at sentences included.

python benchmarks/front.py FOLDER        # a folder from `dlp-edge export --to vllm`

A server of canned tokens stands for vLLM; sixteen clients stream from a front before it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from openai import OpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

CLIENTS = 16
TOKENS = 600
SENTENCES = (
    "Dear Grace, I would like to let you know that the report is due on day {}. "
    "Please tell me if you have any questions. "
)


def serve(port: int, ids: list[int]) -> None:
    """Completions of canned tokens, one an event, as fast as they are taken."""

    async def complete(request: Request) -> Response:
        body = await request.json()

        async def events() -> AsyncIterator[str]:
            for at in range(body["max_tokens"]):
                finish = "length" if at + 1 == body["max_tokens"] else None
                choice = {"token_ids": [ids[at % len(ids)]], "finish_reason": finish}
                yield f"data: {json.dumps({'model': body['model'], 'choices': [choice]})}\n\n"
                await asyncio.sleep(0)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def health(request: Request) -> Response:
        return Response()

    routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/health", health)]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="critical")


def measure(url: str, process: psutil.Process) -> dict[str, float]:
    """Lets all clients ask at once; the front's CPU time and theirs on the clock."""
    own: dict[str, Any] = {"requests": "together", "repetition_stop": False}

    def one(number: int) -> None:
        client = OpenAI(base_url=url, api_key="none", timeout=600)
        for _ in client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": f"Write to Grace about day {number}."}],
            max_tokens=TOKENS,
            stream=True,
            extra_body={"dlp_edge": own},
        ):
            pass

    before, began = sum(process.cpu_times()[:2]), time.perf_counter()
    threads = [threading.Thread(target=one, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = sum(process.cpu_times()[:2]) - before
    return {
        "tokens": CLIENTS * TOKENS,
        "cpu_us_a_token": round(seconds / (CLIENTS * TOKENS) * 1e6, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    tokenizer = Tokenizer.from_file(str(folder / "router" / "tokenizer.json"))
    text = "".join(SENTENCES.format(day) for day in range(40))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    upstream = multiprocessing.get_context("spawn").Process(target=serve, args=(port, ids))
    upstream.start()
    command = [sys.executable, "-m", "dlp_edge.cli.main", "front", str(folder), "--port", "0"]
    front = subprocess.Popen(
        [*command, "--upstream", f"http://127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert front.stdout is not None
        url = front.stdout.readline().strip()
        print(json.dumps(measure(url, psutil.Process(front.pid)), indent=1))
    finally:
        front.kill()
        upstream.kill()


if __name__ == "__main__":
    main()
