"""What the server counts and logs."""

from __future__ import annotations

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from dlp_edge import Runtime
from dlp_edge.server.access_middleware import Access
from tests.testing.serving import HELLO, Served, serving

_SAMPLE = re.compile(r'dlp_edge_\w+(\{\w+="[^"\n]*"(,\w+="[^"\n]*")*\})? [0-9.e+-]+')


def read(served: Served) -> dict[str, float]:
    status, headers, body = served.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    assert all(_SAMPLE.fullmatch(line) for line in lines), lines
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_requests_tokens_and_adapters_are_counted(runtime: Runtime) -> None:
    with serving(runtime) as served:
        before = read(served)
        assert before["dlp_edge_requests_running"] == before["dlp_edge_requests_waiting"] == 0
        found = served.client().chat.completions.create(model="sql", messages=HELLO, max_tokens=5)
        for stream in (True, False):
            answers = served.client().chat.completions.create(
                model="auto", messages=HELLO, max_tokens=5, stream=stream
            )
            list(answers)
        with pytest.raises(openai.NotFoundError):
            served.client().chat.completions.create(model="nobody", messages=HELLO)
        served.ask("GET", "/secret-path")
        after = read(served)
    chat = 'dlp_edge_requests_total{path="/v1/chat/completions",status='
    assert after[chat + '"200"}'] == 3
    assert after[chat + '"404"}'] == 1
    assert after['dlp_edge_requests_total{path="other",status="404"}'] == 1
    assert found.usage is not None
    assert after["dlp_edge_completion_tokens_total"] == 15
    assert after["dlp_edge_prompt_tokens_total"] == 3 * found.usage.prompt_tokens
    assert after['dlp_edge_sentences_total{adapter="sql"}'] >= 1
    assert after["dlp_edge_routings_total"] >= 2
    assert after["dlp_edge_switch_seconds_total"] > 0
    assert after["dlp_edge_first_token_seconds_total"] > 0


def test_gauges_tell_what_runs_and_waits(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(runtime, parallel=1) as served, ThreadPoolExecutor(3) as pool:
        runtime._scheduler.acquire(lambda: False)
        create = served.client().chat.completions.create
        asked = [pool.submit(create, model="base", messages=HELLO, max_tokens=2) for _ in range(3)]
        while served.waiting() < 3:
            pass
        found = read(served)
        runtime._scheduler.release()
        assert all(future.result().choices for future in asked)
    assert (found["dlp_edge_requests_running"], found["dlp_edge_requests_waiting"]) == (1, 2)


def test_the_metrics_need_the_key(runtime: Runtime) -> None:
    with serving(runtime, Access(key="secret")) as served:
        assert served.ask("GET", "/metrics")[0] == 401
        bearer = [("Authorization", "Bearer secret")]
        assert b'status="401"' in served.ask("GET", "/metrics", headers=bearer)[2]


def test_a_line_per_request_without_its_text(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dlp_edge.requests"), serving(runtime) as served:
        found = served.client().chat.completions.create(model="sums", messages=HELLO, max_tokens=5)
        served.ask("GET", '/a"%0A')
    chat, wrong = (json.loads(record.message) for record in caplog.records)
    assert (chat["method"], chat["path"], chat["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (chat["completion_tokens"], chat["finish_reason"]) == (5, "length")
    assert chat["fusions"] == [{"sums": 1.0}]
    assert chat["seconds"] >= chat["first_token"] > 0
    assert (wrong["path"], wrong["status"]) == ('/a"\n', 404)
    written = "".join(record.message for record in caplog.records)
    assert "apples" not in written
    assert (found.choices[0].message.content or "?") not in written
