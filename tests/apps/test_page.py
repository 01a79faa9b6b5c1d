"""The chat page, in a headless Chromium."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlp_edge import Runtime
from dlp_edge.runtime.engine.decoder import Decoder
from dlp_edge.server.access_middleware import Access
from tests.testing.browser import CHROMIUM, Page, open_page
from tests.testing.paths import ROOT
from tests.testing.serving import Served, serving, soon

SMALL = 40 << 10  # bytes of the whole page
PAGE = ROOT / "dlp_edge" / "server" / "page"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
SKILLS = "document.querySelectorAll('#skills li').length === 3"
FREE = "document.getElementById('stop').hidden"
COUNT = "document.querySelectorAll('{}').length"
ANSWERED = f"{FREE} && {COUNT.format('.turn')} === {COUNT.format('.answer .fusions')}"
SENTENCES = """[...document.querySelectorAll('.answer:last-child .sentence')].map(
    (span) => [span.textContent, span.title, getComputedStyle(span).backgroundColor])"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with open_page() as page:
        yield page


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Decoder.step

    def slow_step(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.03)
        return step(*arguments, **options)

    monkeypatch.setattr(Decoder, "step", slow_step)


def show(page: Page, served: Served, **options: Any) -> None:
    page.problems.clear()
    page.open(served.url.removesuffix("/v1") + "/", **options)
    page.wait(SKILLS)


def ask(page: Page, text: str) -> None:
    page.js("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter", 13, "\r")
    page.wait(ANSWERED)


def set_field(page: Page, name: str, value: object) -> None:
    page.js(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")


def said(page: Page) -> list[str]:
    texts: list[str] = page.js(
        "[...document.querySelectorAll('.said')].map((box) => box.textContent)"
    )
    return [text.removeprefix("You: ") for text in texts]


def test_an_answer_is_tinted_sentence_by_sentence(
    page: Page, served: Served, runtime: Runtime
) -> None:
    show(page, served)
    set_field(page, "max_tokens", 60)
    ask(page, "Tom has 3 apples.")
    expected = runtime.generate("Tom has 3 apples.", max_new_tokens=60, requests="auto")
    found = page.js(SENTENCES)
    assert "".join(text for text, _, _ in found) == expected.text.rstrip()
    assert len(found) == len(expected.sentences)
    for (_, title, background), sentence in zip(found, expected.sentences, strict=True):
        names = sorted(sentence.fusion, key=lambda name: -sentence.fusion[name])
        assert all(name in title for name in names or ["base"])
        assert len(names) < 2 or f"{sentence.fusion[names[0]]:.2f}" in title
        assert (background == "rgba(0, 0, 0, 0)") == (not names)
    assert f"{expected.usage.completion_tokens} tokens" in page.js(
        "document.getElementById('figures').textContent"
    )
    assert "Written by" in page.js("document.getElementById('spoken').textContent")
    assert page.problems == []  # of the content security policy, for one


def test_pinned_and_forbidden_skills(page: Page, served: Served) -> None:
    show(page, served)
    set_field(page, "max_tokens", 12)
    second = "document.querySelectorAll('#skills button')[1]"
    page.js(f"{second}.click()")
    assert page.js(f"{second}.getAttribute('aria-label')") == "sql: pinned"
    ask(page, "Tom has 3 apples.")
    assert {title for _, title, _ in page.js(SENTENCES)} == {"sql"}
    page.js(f"{second}.click()")
    assert page.js(f"{second}.getAttribute('aria-label')") == "sql: forbidden"
    ask(page, "Tom has 3 apples.")
    assert not any("sql" in title for _, title, _ in page.js(SENTENCES))


def test_text_of_others_is_never_markup(page: Page, served: Served) -> None:
    show(page, served)
    set_field(page, "max_tokens", 4)
    evil = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"
    ask(page, evil)
    assert said(page) == [evil]
    assert page.js("document.title") == "dlp-edge"
    assert page.js("document.querySelectorAll('#log img, #log script').length") == 0


def test_edit_and_regenerate(page: Page, served: Served) -> None:
    show(page, served)
    set_field(page, "max_tokens", 10)
    ask(page, "Tom has 3 apples.")
    first = page.js(SENTENCES)
    ask(page, "And then?")
    page.js("document.querySelector('.turn .actions button').click()")
    field = "document.querySelector('.said textarea')"
    assert page.js(f"document.activeElement === {field}")
    page.press("Escape", 27)
    assert said(page) == ["Tom has 3 apples.", "And then?"]
    page.js("document.querySelector('.turn .actions button').click()")
    page.js(f"{field}.value = 'List all dogs.'")
    page.press("Enter", 13, "\r")
    page.wait(f"{ANSWERED} && document.querySelectorAll('.turn').length === 1")
    assert said(page) == ["List all dogs."]
    edited = page.js(SENTENCES)
    assert edited != first
    page.js("document.querySelector('.answer').id = 'old'")
    page.js("document.querySelector('.answer .actions button:last-child').click()")
    page.wait(f"{ANSWERED} && document.getElementById('old') === null")
    assert page.js(SENTENCES) == edited  # greedy


@pytest.mark.usefixtures("slow")
def test_escape_stops(page: Page, served: Served) -> None:
    show(page, served)
    set_field(page, "max_tokens", 300)
    page.js("document.getElementById('prompt').focus()")
    page.type("Tom has 3 apples.")
    page.press("Enter", 13, "\r")
    page.wait("document.querySelectorAll('.sentence').length > 0")
    page.press("Escape", 27)
    page.wait(ANSWERED)
    assert "stopped" in page.js("document.getElementById('figures').textContent")
    assert soon(lambda: served.waiting() == 0)  # the server's answer ended, too


def test_keys_of_the_message(page: Page, served: Served) -> None:
    show(page, served)
    page.js("document.getElementById('prompt').focus()")
    page.type("one")
    page.press("Enter", 13, "\r", shift=True)
    page.type("two")
    assert page.js("document.getElementById('prompt').value") == "one\ntwo"
    assert page.js("document.querySelectorAll('.turn').length") == 0


def test_a_server_with_a_key(page: Page, runtime: Runtime) -> None:
    with serving(runtime, Access(key="sesame")) as served:
        for path in ("/", "/docs", "/openapi.json", "/page/main.js", "/health"):
            assert served.ask("GET", path)[0] == 200
        assert served.ask("GET", "/v1/models")[0] == 401
        page.problems.clear()
        page.open(served.url.removesuffix("/v1") + "/")
        wrong = "document.getElementById('key-wrong')"
        for key, before in (("wrong", "true"), ("sesame", "false")):
            page.wait(f"document.getElementById('key-dialog').open && {wrong}.hidden === {before}")
            set_field(page, "key", key)
            page.js("document.querySelector('#key-dialog button').click()")
        page.wait(SKILLS)
        set_field(page, "max_tokens", 4)
        ask(page, "Tom has 3 apples.")
        assert page.js(SENTENCES)
        page.js("sessionStorage.clear()")


def test_an_error_is_shown(page: Page, served: Served) -> None:
    show(page, served)
    ask(page, "x" * 600)
    assert "context" in page.js("document.querySelector('[role=alert]').textContent")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1000, 320])
def test_it_fits_and_reads_well(page: Page, served: Served, width: int, dark: bool) -> None:
    page.open(served.url.removesuffix("/v1") + "/", width=width)
    page.js("localStorage.clear()")
    show(page, served, width=width, dark=dark)
    assert page.js("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    set_field(page, "max_tokens", 40)
    ask(page, "Tom has 3 apples.")
    page.js("document.getElementById('options').click()")
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    spec = importlib.util.find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("axe-core-python is not installed")
    page.js((Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8") + ";0")
    found = page.js("axe.run(document).then((result) => result.violations)")
    assert [(each["id"], each["impact"]) for each in found] == []
    page.open(served.url.removesuffix("/v1") + "/docs", width=width, dark=dark)
    assert page.js("document.querySelectorAll('tr').length") > 5


def test_the_page_is_small_and_asks_nobody_else() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert sum(map(len, texts.values())) < SMALL
    outside = [name for name, text in texts.items() if "//" in text.replace("http://www.w3", "")]
    assert all(name.endswith(".js") for name in outside)  # where it begins a comment
    assert not any("innerHTML" in text or "eval(" in text for text in texts.values())


def test_the_own_page_may_post_and_no_other(served: Served) -> None:
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "x"}]}).encode()
    here = f"http://127.0.0.1:{served.port}"
    for origin, status in [(here, 200), ("http://127.0.0.1:1", 403), ("null", 403)]:
        headers = [("Content-Type", "application/json"), ("Origin", origin)]
        asked = json.loads(body) | {"max_tokens": 1}
        found = served.ask("POST", "/v1/chat/completions", json.dumps(asked).encode(), headers)
        assert found[0] == status
    headers_of = served.ask("GET", "/")[1]
    assert "default-src 'none'" in headers_of["content-security-policy"]
    assert "unsafe" not in headers_of["content-security-policy"]
