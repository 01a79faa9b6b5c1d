"""Chat template, detokeniser, stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from dlp_edge.errors import BundleError, UsageError
from dlp_edge.runtime.text.detokenizer import Detokenizer, StopMatcher
from dlp_edge.untrusted.chat_template import ChatTemplate
from dlp_edge.untrusted.tokenizer_file import load_tokenizer
from tests.testing.paths import DATA


def test_template_renders_roles() -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    rendered = ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    assert rendered == "[user]hi"


def test_no_template_is_the_text_itself() -> None:
    assert ChatTemplate(None).render([{"role": "user", "content": "hi"}]) == "hi"


def test_template_cannot_leave_its_sandbox() -> None:
    source = "{{ messages.__class__.__mro__[-1].__subclasses__() }}"
    with pytest.raises(BundleError, match="template is unsafe"):
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])


def test_template_may_refuse_messages() -> None:
    with pytest.raises(UsageError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(
            [{"role": "user", "content": "hi"}]
        )


def test_broken_template_is_a_bundle_error() -> None:
    with pytest.raises(BundleError, match="template"):
        ChatTemplate("{% for %}")


def test_broken_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer|model|missing"):
        load_tokenizer(b"{}")


@given(st.text(max_size=30))
def test_detokeniser_gives_whole_characters_and_all_of_them(text: str) -> None:
    tokenizer = _byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.step(token) for token in tokenizer.encode(text).ids]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_detokeniser_shows_an_unfinished_character_at_the_end() -> None:
    tokenizer = _byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("a😀").ids
    assert "".join(detokenizer.step(token) for token in ids[:-1]) == "a"
    assert "\N{REPLACEMENT CHARACTER}" in detokenizer.finish()


@given(st.text(alphabet="hé 😀中\n", max_size=20))
def test_detokeniser_with_byte_fallback(text: str) -> None:
    """As Llama 2's tokenizer: characters that are no piece of their own are bytes."""
    tokenizer = _fallback_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("h" + text).ids
    pieces = [detokenizer.step(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_detokeniser_survives_cut_characters() -> None:
    tokenizer = _fallback_tokenizer()
    ids = [tokenizer.token_to_id(piece) for piece in ("h", "<0x0A>", "<0xF0>", "<0x9F>", "h", "é")]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.step(token) for token in ids) + detokenizer.finish()
    assert text.startswith("h\n")
    assert text.endswith("hé")


@pytest.mark.parametrize("body", ["1 / 0", "messages[9].content"])
def test_template_failures_are_usage_errors(body: str) -> None:
    with pytest.raises(UsageError, match="rejects these messages"):
        ChatTemplate("{{ " + body + " }}").render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("body", ["1 + 'a'", "range(10 ** 9)"])
def test_templates_that_could_grow_are_the_bundles_fault(body: str) -> None:
    with pytest.raises(BundleError, match="template is unsafe"):
        ChatTemplate("{{ " + body + " }}").render([{"role": "user", "content": "hi"}])


def test_template_gets_the_special_tokens() -> None:
    source = (
        "{{ bos_token }}{{ messages[0].content | tojson(separators=(',', ':')) }}{{ eos_token }}"
    )
    rendered = ChatTemplate(source).render([{"role": "user", "content": "é"}], "<s>", "</s>")
    assert rendered == '<s>"é"</s>'


stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


@given(st.text(alphabet="abc", max_size=30), stop_lists, st.data())
def test_stop_strings_cut_at_the_first_match(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """The text given out ends before the match that is complete first, whatever the pieces."""
    matcher, given_out = StopMatcher(stops), ""
    for character in text:
        given_out += matcher.feed(character)
        if matcher.matched:
            break
    else:
        given_out += matcher.finish()
    ends = [
        (text.find(stop) + len(stop), text.find(stop)) for stop in stops if text.find(stop) >= 0
    ]
    if ends:
        first_end = min(end for end, _ in ends)
        assert given_out == text[: min(start for end, start in ends if end == first_end)]
    else:
        assert given_out == text


def _byte_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DATA / "bytes.json"))


def _fallback_tokenizer() -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "é"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
