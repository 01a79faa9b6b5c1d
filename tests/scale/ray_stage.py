"""The Ray Serve recipe on two nodes of loopback: load, cancellation, deaths, scaling.

python tests/scale/ray_stage.py BUNDLE FIGURES.json, in an environment of Ray's own: `.ci/ray`
makes it. Each step prints and keeps what clients saw, and the program fails where that is wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "integrations" / "ray"
os.environ["PYTHONPATH"] = str(RECIPE)  # of the replicas
sys.path.insert(0, str(RECIPE))

import aiohttp  # noqa: E402
import edge  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

PROMPTS = json.loads((ROOT / "dlp_edge/demo/prompts.json").read_text())
LONG = PROMPTS[3]
PORT = 8265
NODE: dict[str, Any] = {
    "num_cpus": 2,
    "node_ip_address": "127.0.0.1",
    "object_store_memory": 80 << 20,
}


@dataclass
class Seen:
    """What a client saw of one request."""

    status: int = 0
    text: str = ""
    done: bool = False
    error: str = ""
    seconds: float = 0.0
    arrivals: list[float] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """`whole`, `cut` in the middle, `refused` by a status, or `failed` before any."""
        if self.done:
            return "whole"
        if self.text:
            return "cut"
        return f"refused {self.status}" if self.status >= 400 else "failed"


class Stage:
    """The cluster, a client, and the figures so far."""

    def __init__(self, bundle: str, http: aiohttp.ClientSession, cluster: Cluster) -> None:
        self.figures: dict[str, Any] = {}
        self._bundle = bundle
        self._http = http
        self.cluster = cluster

    def run(self, **settings: Any) -> None:
        """Deploys the recipe anew, and waits until it is ready."""
        if serve.status().applications:
            serve.delete("default")
        serve.run(edge.app(edge.Settings(bundle=self._bundle, **settings)), route_prefix="/")

    def note(self, step: str, **figures: Any) -> None:
        self.figures[step] = figures
        print(f"{step}: {json.dumps(figures)}", flush=True)

    async def ask(
        self,
        prompt: str,
        tokens: int = 64,
        leave_after: int = 0,
        on_chunk: Callable[[int], None] = lambda count: None,
        session: str = "",
    ) -> Seen:
        """One streamed request.

        Args:
            leave_after: chunks after which the client goes away; 0 stays.
            on_chunk: called with the number of chunks so far.
            session: the X-Session-Id, for `sticky`.
        """
        seen, began = Seen(), time.perf_counter()
        body = {
            "model": "auto",
            "stream": True,
            "max_tokens": tokens,
            "messages": [{"role": "user", "content": prompt}],
        }
        url = f"http://127.0.0.1:{PORT}/v1/chat/completions"
        try:
            headers = {"X-Session-Id": session} if session else {}
            async with self._http.post(url, json=body, headers=headers) as response:
                seen.status = response.status
                async for line in response.content:
                    if line.startswith(b"data: [DONE]"):
                        seen.done = not seen.error
                    elif line.startswith(b"data: {"):
                        document = json.loads(line[6:])
                        if "error" in document:
                            seen.error = document["error"]["message"]
                            continue
                        delta = document["choices"][0]["delta"]
                        seen.text += delta.get("content") or ""
                        seen.arrivals.append(time.perf_counter() - began)
                        on_chunk(len(seen.arrivals))
                        if leave_after and len(seen.arrivals) >= leave_after:
                            return seen
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            seen.error = type(error).__name__
        seen.seconds = round(time.perf_counter() - began, 2)
        return seen

    def replicas(self) -> int:
        """How many are running."""
        status = serve.status().applications["default"].deployments["edge"]
        return int(status.replica_states.get("RUNNING", 0))

    async def until(self, condition: Callable[[], bool], seconds: float) -> float:
        """Waits for it; returns the seconds that took."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"not within {seconds} s")
            await asyncio.sleep(0.5)
        return round(time.monotonic() - began, 1)


def start_proxy() -> None:
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})


def replica_pids() -> list[int]:
    """The replicas' processes, which Ray names after their class."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "ServeReplica:" in " ".join(process.info["cmdline"] or [])
    ]


def cpu_seconds() -> dict[int, float]:
    """What each replica has computed so far."""
    times = {pid: psutil.Process(pid).cpu_times() for pid in replica_pids()}
    return {pid: found.user + found.system for pid, found in times.items()}


def kinds(seen: list[Seen]) -> dict[str, int]:
    return dict(Counter(each.kind for each in seen))


async def load(stage: Stage) -> None:
    """Twelve at once on two replicas: streamed, and the same text from both."""
    stage.run(min_replicas=2, max_replicas=2, replicas_per_node=1)
    began = time.monotonic()
    seen = await asyncio.gather(*(stage.ask(PROMPTS[at % 6]) for at in range(12)))
    texts = {at: {s.text for s in seen[at::6]} for at in range(6)}
    streamed = [s.arrivals[-1] - s.arrivals[0] for s in seen]
    stage.note(
        "load",
        clients=kinds(seen),
        seconds=round(time.monotonic() - began, 1),
        replicas=stage.replicas(),
    )
    assert kinds(seen) == {"whole": 12}
    assert all(len(found) == 1 for found in texts.values())
    assert min(streamed) > 0  # piece by piece, not at the end


async def cancellation(stage: Stage) -> None:
    """A client that leaves gives its replica back: the next answer does not wait for the rest."""
    usual = await stage.ask(PROMPTS[1])
    await asyncio.gather(*(stage.ask(LONG, 400, leave_after=3) for _ in range(2)))
    after = await asyncio.gather(*(stage.ask(PROMPTS[1]) for _ in range(2)))
    whole = await stage.ask(LONG, 400)
    stage.note(
        "cancellation",
        alone_s=usual.seconds,
        after_two_left_s=[each.seconds for each in after],
        the_left_one_whole_s=whole.seconds,
    )
    assert kinds(after) == {"whole": 2}


async def replica_killed(stage: Stage) -> None:
    """SIGKILL to a replica while both are busy and others wait."""
    killed: list[int] = []

    def kill(count: int) -> None:
        if count == 4 and not killed:
            killed.append(replica_pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    seen = await asyncio.gather(*(stage.ask(LONG, 200, on_chunk=kill) for _ in range(6)))
    meanwhile = [await stage.ask(PROMPTS[1])]
    seconds = await stage.until(lambda: stage.replicas() == 2 and len(replica_pids()) == 2, 90)
    stage.note(
        "replica killed",
        clients=kinds(seen),
        errors=sorted({each.error for each in seen if each.error}),
        meanwhile=kinds(meanwhile),
        again_two_after_s=seconds,
    )
    assert killed
    assert kinds(meanwhile) == {"whole": 1}
    # At most those that the dead replica had: one that it answered, and one that waited in it.
    assert sum(each.kind != "whole" for each in seen) <= 2


async def scaling(stage: Stage) -> None:
    """One replica, three under load, and one again."""
    stage.run(min_replicas=1, max_replicas=3, upscale_seconds=2, downscale_seconds=10)
    await stage.until(lambda: stage.replicas() == 1, 90)
    until = time.monotonic() + 60
    seen: list[Seen] = []

    async def client() -> None:
        while time.monotonic() < until and stage.replicas() < 3:
            seen.append(await stage.ask(PROMPTS[3]))

    began = time.monotonic()
    clients = asyncio.gather(*(client() for _ in range(8)))
    up = await stage.until(lambda: stage.replicas() == 3, 60)
    await clients
    loaded = time.monotonic() - began
    down = await stage.until(lambda: stage.replicas() == 1, 120)
    stage.note(
        "scaling",
        up_to_three_s=up,
        back_to_one_s=down,
        load_s=round(loaded, 1),
        clients=kinds(seen),
    )
    assert kinds(seen).keys() == {"whole"}


async def node_killed(stage: Stage, node: Any) -> None:
    """A node goes away with its replica while both are busy."""
    stage.run(min_replicas=2, max_replicas=2, replicas_per_node=1)
    await stage.until(lambda: stage.replicas() == 2, 90)
    asked = [asyncio.create_task(stage.ask(LONG, 200)) for _ in range(4)]
    await asyncio.sleep(2)
    gone_at = time.monotonic()
    await asyncio.to_thread(stage.cluster.remove_node, node, False)
    seen = await asyncio.gather(*asked)
    after = [await stage.ask(PROMPTS[1]) for _ in range(3)]
    first_good = round(time.monotonic() - gone_at, 1)
    stage.cluster.add_node(**NODE)
    seconds = await stage.until(lambda: stage.replicas() == 2, 120)
    stage.note(
        "node killed",
        clients=kinds(seen),
        errors=sorted({each.error for each in seen if each.error}),
        next_three=kinds(after),
        answered_until_s=first_good,
        new_node_serves_after_s=seconds,
    )
    assert kinds(after) == {"whole": 3}
    assert sum(each.kind != "whole" for each in seen) <= 2


async def stay(stage: Stage) -> None:
    """With `sticky`, a session's requests go to one replica, and sessions are spread."""
    serve.shutdown()  # a proxy keeps the kind of router that it began with
    start_proxy()
    stage.run(min_replicas=2, max_replicas=2, replicas_per_node=1, sticky=True)
    await stage.until(lambda: stage.replicas() == 2 and len(replica_pids()) == 2, 90)
    busiest: Counter[int] = Counter()
    shares = []
    for session in range(10):
        before = cpu_seconds()
        for _ in range(2):
            assert (await stage.ask(PROMPTS[2], session=f"session {session}")).kind == "whole"
        spent = {pid: now - before.get(pid, 0.0) for pid, now in cpu_seconds().items()}
        most = max(spent, key=lambda pid: spent[pid])
        busiest[most] += 1
        shares.append(round(spent[most] / sum(spent.values()), 2))
    stage.note("sticky", share_of_its_replica=shares, sessions_a_replica=list(busiest.values()))
    assert min(shares) > 0.8
    assert len(busiest) == 2


async def main(bundle: str, figures: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    node = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    start_proxy()
    timeout = aiohttp.ClientTimeout(total=180)
    try:
        connector = aiohttp.TCPConnector(limit=64)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
            stage = Stage(bundle, http, cluster)
            steps: list[Callable[[], Awaitable[None]]] = [
                lambda: load(stage),
                lambda: cancellation(stage),
                lambda: replica_killed(stage),
                lambda: node_killed(stage, node),
                lambda: scaling(stage),
                lambda: stay(stage),
            ]
            for step in steps:
                await step()
            figures.write_text(json.dumps(stage.figures, indent=1), encoding="utf-8")
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
