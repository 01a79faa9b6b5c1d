"""Attacks by tokenizers and chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.security.attacks.forge import Attack, edited, replaced

Document = dict[str, Any]
Change = Callable[[bytes], bytes]


def on_json(change: Callable[[Document], object]) -> Change:
    def content(data: bytes) -> bytes:
        document = json.loads(data)
        change(document)
        return json.dumps(document).encode()

    return content


def _split(pattern: str) -> Callable[[Document], object]:
    kind = {"type": "Split", "behavior": "Isolated", "invert": False}
    return lambda d: d.update(pre_tokenizer={**kind, "pattern": {"Regex": pattern}})


def _replace(pattern: str, content: str = "") -> Callable[[Document], object]:
    kind = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    return lambda d: d.update(normalizer=kind)


def _grow(document: Document) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [step] * 40}


def _unigram(model: Document) -> Callable[[Document], object]:
    return lambda d: d.update(model={"type": "Unigram", "byte_fallback": False, **model})


_TOKENIZERS: dict[str, Change] = {
    "empty": lambda data: b"",
    "no JSON": lambda data: b"\x80\x04.",
    "a list": lambda data: b"[]",
    "an object": lambda data: b"{}",
    "cut": lambda data: data[: len(data) // 2],
    "nested lists": lambda data: b"[" * 5_000_000,
    "nested normalizers": lambda data: (
        b'{"normalizer":' + b'{"type":"Sequence","normalizers":[' * 100_000
    ),
    "no model": on_json(lambda d: d.pop("model")),
    "an unknown model": on_json(lambda d: d["model"].update(type="Evil")),
    "a negative id": on_json(lambda d: d["model"]["vocab"].update(a=-1)),
    "an id beyond 32 bits": on_json(lambda d: d["model"]["vocab"].update(a=1 << 40)),
    "an unknown merge": on_json(lambda d: d["model"].update(merges=[["qq", "zz"]])),
    "more tokens than the backbone": on_json(
        lambda d: d["model"]["vocab"].update({f"token{i}": 1_000 + i for i in range(50_000)})
    ),
    "unigram without tokens": on_json(_unigram({"vocab": [], "unk_id": None})),
    "unigram, unknown id outside": on_json(_unigram({"vocab": [["a", 0.0]], "unk_id": 9})),
    "unigram without an unknown": on_json(_unigram({"vocab": [["zzzz", -1.0]], "unk_id": None})),
    "a charsmap of nothing": on_json(
        lambda d: d.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    ),
    "a charsmap of noise": on_json(
        lambda d: d.update(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "EAAAAP////8B/wH/AQID/w=="}
        )
    ),
    "backtracking": on_json(_split("(a+)+$")),
    "backtracking by choice": on_json(_split("(a|aa)+$")),
    "backtracking in a normalizer": on_json(_replace("(x+x+)+y")),
    "backtracking by three": on_json(_split(r"[^\x00]*[^\x00]*[^\x00]*x")),
    "backtracking by counts": on_json(_split("(?:a?){40}a{40}")),
    "a reference back": on_json(_split(r"(a*)\1*b")),
    "a pattern that calls itself": on_json(_split(r"(?<x>a\g<x>|)")),
    "a pattern of a megabyte": on_json(_split("a" * (1 << 20))),
    "a pattern of counts of counts": on_json(_split("(?:(?:a{1000}){1000}){1000}")),
    "a pattern that is none": on_json(_split("(")),
    "a pattern of deep groups": on_json(_split("(" * 10_000 + ")" * 10_000)),
    "a replacement of a megabyte": on_json(_replace("a", "x" * (1 << 20))),
    "a replacement of a thousand": on_json(_replace("a", "x" * 1_000)),
    "forty replacements that double": on_json(_grow),
    "a prefix of a megabyte": on_json(
        lambda d: d.update(normalizer={"type": "Prepend", "prepend": "x" * (1 << 20)})
    ),
    "a thousand normalizers": on_json(
        lambda d: d.update(
            normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1_000}
        )
    ),
    "a decoder that backtracks": on_json(
        lambda d: d.update(
            decoder={"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""}
        )
    ),
    "a template of unknown tokens": on_json(
        lambda d: d.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        )
    ),
}

TEMPLATES: dict[str, str] = {
    "no Jinja": "{% for %}",
    "attributes of classes": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c }}"
    "{% endfor %}",
    "attributes of a function": "{{ raise_exception.__globals__['os'].system('id') }}",
    "attributes of a namespace": "{{ namespace.__init__.__globals__ }}",
    "attributes by a filter": "{{ (''|attr('__class__')).__mro__ }}",
    "attributes of itself": "{{ self.__init__.__globals__ }}",
    "a loop of a loop": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}"
    "{% endfor %}",
    "three loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    "{% set x = a %}{% endfor %}{% endfor %}{% endfor %}",
    "a range of everything": "{% for a in range(10000000000) %}{% endfor %}",
    "200 MB": "{% for a in range(100000) %}" + "y" * 2_000 + "{% endfor %}",
    "a text times a billion": "{{ 'x' * 1000000000 }}",
    "a list times a billion": "{{ [0] * 1000000000 }}",
    "a power of powers": "{{ 10 ** 10 ** 10 }}",
    "a format of a billion": "{{ '%1000000000d' % 1 }}",
    "a format method of a billion": "{{ '{:>1000000000}'.format(1) }}",
    "a format map of a billion": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "a format filter of a billion": "{{ '%1000000000d'|format(1) }}",
    "a centre of a billion": "{{ 'x'|center(1000000000) }}",
    "a centre method of a billion": "{{ 'x'.center(1000000000) }}",
    "a padding of a billion": "{{ 'x'.ljust(1000000000) }}",
    "zeros of a billion": "{{ 'x'.zfill(1000000000) }}",
    "tabs of a billion": "{{ '\t'.expandtabs(1000000000) }}",
    "an indent of a billion": "{{ 'a\nb'|indent(1000000000) }}",
    "a batch of a billion": "{{ [1]|batch(1000000000, 0)|list }}",
    "slices of a billion": "{{ [1]|slice(1000000000)|list }}",
    "JSON indented by a billion": "{{ [1]|tojson(indent=1000000000) }}",
    "a date of a billion": "{{ strftime_now('%1000000000Y') }}",
    "doubling by plus": "{% set n = namespace(x='xxxx') %}{% for a in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by tilde": "{% set n = namespace(x='xxxx') %}{% for a in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by blocks": "{% set n = namespace(x='xxxx') %}{% for a in range(60) %}{% set n.x %}"
    "{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubling by replacement": "{% set n = namespace(x='xxxx') %}{% for a in range(60) %}"
    "{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
    "doubling by a filter": "{% set n = namespace(x='xxxx') %}{% for a in range(60) %}"
    "{% set n.x = n.x|replace('x', 'xx') %}{% endfor %}",
    "growing by joins": "{% set n = namespace(x='xxxx') %}{% for a in range(60) %}"
    "{% set n.x = n.x.join([n.x, n.x, n.x]) %}{% endfor %}",
    "lists of lists": "{% set n = namespace(x=[1]) %}{% for a in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "tables of tables": "{% set n = namespace(x=[1]) %}{% for a in range(60) %}"
    "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x|tojson }}",
    "comparing lists of lists": "{% set n = namespace(x=[1], y=[1]) %}{% for a in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop that calls itself": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "an include": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}",
    "an extension": "{% extends '/etc/passwd' %}",
    "messages changed": "{{ messages.append(1) }}",
    "deep brackets": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
}


def _templated(template: str) -> Attack:
    return edited(lambda m: m.update(chat_template=template))


ATTACKS: dict[str, Attack] = {
    **{f"tokenizer: {name}": replaced("tokenizer.json", c) for name, c in _TOKENIZERS.items()},
    **{
        f"router tokenizer: {name}": replaced("router_tokenizer.json", change)
        for name, change in _TOKENIZERS.items()
        if name not in ("more tokens than the backbone", "an unknown merge", "a negative id",
                        "an id beyond 32 bits")
    },
    **{f"template: {name}": _templated(template) for name, template in TEMPLATES.items()},
}  # fmt: skip
