"""Bundles that are well formed and would cost time or memory without bound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.security.attacks.forge import Attack, edited, replaced
from tests.security.attacks.graphs import on_model
from tests.security.attacks.texts import Document, on_json

MB = "{% set n = namespace(a='ab') %}{% for i in range(19) %}{% set n.a = n.a + n.a %}{% endfor %}"
MB += "{% set a = n.a %}"  # a text of 1 MB
REFERENCES = MB + "{% set n.r = [a] %}{% for i in range(10) %}{% set n.r = n.r + n.r %}{% endfor %}"
SAME = MB.replace("'ab'", "'aa'")

TEMPLATES = {
    **{
        f"reverse search: {name}": SAME + "{% set k = 'b' ~ a[:500000] %}{{ a." + call + " }}"
        for name, call in {
            "rfind": "rfind(k)",
            "rindex": "rindex(k)",
            "rsplit": "rsplit(k)|length",
            "rpartition": "rpartition(k)|length",
        }.items()
    },
    **{
        f"references: {name}": REFERENCES + "{% set r = n.r %}" + body
        for name, body in {
            "tojson": "{{ r|tojson|length }}",
            "string": "{{ (r|string)|length }}",
            "output": "{{ r }}",
            "tilde": "{{ (r ~ r)|length }}",
            "upper": "{{ (r|upper)|length }}",
            "join": "{{ (r|join)|length }}",
            "join method": "{{ ''.join(r)|length }}",
            "map": "{{ (r|map('upper')|list)|length }}",
            "sort": "{{ (r|sort)|length }}",
            "unique": "{{ (r|unique|list)|length }}",
            "max": "{{ (r|max)|length }}",
            "groupby": "{{ (r|map('list')|list)|length }}",
            "replace": "{{ (r|replace('a', 'bb'))|length }}",
            "dictsort": "{{ ({'a': r}|dictsort(by='value'))|length }}",
            "macro": "{% macro m() %}{{ r }}{% endmacro %}{{ m()|length }}",
        }.items()
    },
    "reversed searches by a filter": SAME + "{% set k = 'b' ~ a[:500000] %}"
    "{{ [a]|map(attribute='rfind')|list|length }}",
    "JSON indented deeply": "{% set n = namespace(x=[1]) %}{% for i in range(900) %}"
    "{% set n.x = [n.x] %}{% endfor %}{{ n.x|tojson(indent=8)|length }}",
    "JSON of control characters": MB.replace("'ab'", "'\\x00\\x01'") + "{{ [a, a, a]|tojson }}",
    "lists in lists of references": REFERENCES + "{% set x = [[n.r], [n.r], {'k': n.r}] %}"
    "{{ x|string|length }}",
    "references selected and sorted": REFERENCES + "{{ n.r|select|sort|length }}",
    "a text in references": REFERENCES + "{{ (a ~ 'b') in (n.r|select) }}",
    "big numbers": "{{ ('9' * 1)|int }}{{ 0x"
    + "f" * 200_000
    + " is divisibleby(0x"
    + "e" * 50_000
    + ") }}",
    "escaped quotes": MB.replace("'ab'", "'\"&'") + "{{ a|e|e|e|length }}",
    "many expressions": "{{a+a}}" * 37_000,
    "many sets": "{% set a=1 %}" * 20_000,
    "many filters": "{{ 1" + "|abs" * 60_000 + " }}",
    "a long list": "{{ [" + "a," * 120_000 + "] }}",
    "a rounding of a billion": "{{ 1.5|round(1000000000, 'ceil') }}",
    "sums of lists": "{% set n = namespace(r=[[1]]) %}{% for i in range(14) %}"
    "{% set n.r = n.r + n.r %}{% endfor %}{{ n.r|sum(start=[])|length }}",
    "letters of a text": MB + "{{ a|list|length }}",
    "lines of a text": MB.replace("'ab'", "'\\n\\n'") + "{{ a.splitlines()|length }}",
    "parts of a text": MB + "{{ a.split('a')|length }}",
    "words of a text": MB.replace("'ab'", "'a '") + "{{ a|wordcount }}",
    "letters stripped": SAME + "{{ a.strip('b' * 0 ~ a[:1] ~ a.replace('a', 'b')) }}",
    "letters stripped slowly": SAME + "{% set k = a.replace('a', 'b') ~ 'a' %}"
    "{{ a.strip(k)|length }}",
    "comparing references": SAME + "{% set b = a[:1] ~ a[1:] %}{% set n.x = [a] %}"
    "{% set n.y = [b] %}{% for i in range(16) %}{% set n.x = n.x + n.x %}"
    "{% set n.y = n.y + n.y %}{% endfor %}{{ n.x == n.y }}",
    "counting references": SAME + "{% set b = a[:1] ~ a[1:] %}{% set n.x = [a] %}"
    "{% for i in range(16) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x.count(b) }}",
}


def templated(template: str) -> Attack:
    return edited(lambda manifest: manifest.update(chat_template=template))


def normalizer(*steps: Document) -> Callable[[Document], object]:
    return lambda d: d.update(normalizer={"type": "Sequence", "normalizers": list(steps)})


def replacement(old: str, new: str) -> Document:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _pattern(pattern: str) -> Callable[[Document], object]:
    kind = {"type": "Split", "behavior": "Isolated", "invert": False}
    return lambda d: d.update(pre_tokenizer={**kind, "pattern": {"Regex": pattern}})


def _word_piece(limit: int, prefix: str = "##") -> Callable[[Document], object]:
    model = {
        "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": prefix,
        "max_input_chars_per_word": limit, "vocab": {"[UNK]": 0, "a": 1, prefix + "a": 2},
    }  # fmt: skip
    return lambda d: d.update(model=model, added_tokens=[], pre_tokenizer=None)


def _special(ids: int, uses: int) -> Callable[[Document], object]:
    piece = {"SpecialToken": {"id": "[X]", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    token = {"id": "[X]", "ids": [1] * ids, "tokens": ["a"] * ids}
    post = {
        "type": "TemplateProcessing", "single": [piece] * uses + [text], "pair": [text, text],
        "special_tokens": {"[X]": token},
    }  # fmt: skip
    return lambda d: d.update(post_processor=post)


def _unknown(document: Document) -> None:
    token = "x" * (1 << 20)
    vocab = {token: 0, "q": 1}
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    document.update(
        model={"type": "WordLevel", "vocab": vocab, "unk_token": token},
        added_tokens=[],
        pre_tokenizer=split,
    )


def _long_token(document: Document) -> None:
    vocab = document["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab["y" * (4 << 20)] = vocab.pop(last)


def _unigram(document: Document) -> None:
    vocab = [["<unk>", 0.0], *(["a" * n, -1.0] for n in range(1, 200))]
    document.update(
        model={"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": vocab},
        added_tokens=[],
    )


def added(**changes: Any) -> Callable[[Document], object]:
    token = {
        "id": 1, "content": "a", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": False, **changes,
    }  # fmt: skip
    return lambda d: d["added_tokens"].append(token)


NFKD = {"type": "NFKD"}
TOKENIZERS: dict[str, Callable[[Document], object]] = {
    "growth by decomposition": normalizer(replacement("a", "\ufdfa" * 64), NFKD),
    "growth by composition": normalizer(replacement("a", "\ufdfa" * 64), {"type": "NFKC"}),
    "growth before bytes": normalizer(replacement("a", "\U0001f600" * 60), {"type": "ByteLevel"}),
    "growth of Chinese": normalizer(
        replacement("a", "\u4e16" * 60),
        {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
    ),
    "growth by dots": normalizer(replacement("a", "\u0130" * 64), {"type": "Lowercase"}),
    "growth by empty matches": lambda d: d.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "(?=a)"}, "content": "x" * 64}
    ),
    "growth in decoding": lambda d: d.update(
        decoder={
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, *([replacement("a", "a" * 16)] * 6)],
        }
    ),
    "word pieces of any length": _word_piece(10**9),
    "word pieces of 5,000": _word_piece(5_000),
    "word pieces of long prefixes": _word_piece(100, "#" * 1_900),
    "a special token of 200,000 ids": _special(200_000, 120),
    "special tokens by 250": _special(1_000, 250),
    "an unknown token of a megabyte": _unknown,
    "a token of four megabytes": _long_token,
    "unigrams of all lengths": _unigram,
    "an added token that strips left": added(lstrip=True),
    "an added token that is a word": added(single_word=True),
    **{
        f"pattern {pattern!r}": _pattern(pattern)
        for pattern in (
            r"[^\x00]*(?<=\x01)",
            r"[^\x00]+(?<=\x01)",
            r"(?:[^\x00]*(?<=\x01)|b)",
            r"[^\x00]*(?!a)\x02",
            r"(?=[^\x00]*)a",
            r"(?=[^\x00]*\x02)",
            r"a|[^\x00]*\x02",
            r"[a-zA-Z]*\d|[b-z]+",
            r"[^\x00]*\x02|a|[^\x00]+",
            r"(?:a{1,16}){1,100}b",
            r".*b",
            r"\w+\b\x02",
        )
    },
}


def _doubled(operator: str, constant: bool) -> Callable[[Any], object]:
    """Concatenates a value with itself 28 times."""

    def change(model: Any) -> None:
        name = "small"
        if constant:
            array = np.zeros((1, 16), np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        else:
            kind = {"to": TensorProto.FLOAT}
            model.graph.node.append(helper.make_node("Cast", ["input_ids"], [name], **kind))
        for index in range(28):
            new = f"double_{index}"
            if operator == "Concat":
                node = helper.make_node("Concat", [name, name], [new], axis=1)
            else:
                node = helper.make_node(operator, [name, name], [new])
            model.graph.node.append(node)
            name = new
        keep(model, name)

    return change


def keep(model: Any, name: str) -> None:
    """Adds nothing of a value to the first output, so that no optimizer removes its node."""
    graph = model.graph
    output = graph.output[0].name
    for node in graph.node:
        for index, other in enumerate(node.output):
            if other == output:
                node.output[index] = output + "_before"
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.zeros((), np.int64), "cost_zero"),
            numpy_helper.from_array(np.array([1, 1], np.int64), "cost_shape"),
        ]
    )
    nodes = [
        helper.make_node("Gather", [name, "cost_zero"], ["cost_row"], axis=0),
        helper.make_node("Gather", ["cost_row", "cost_zero"], ["cost_item"], axis=0),
        helper.make_node("Add", [output + "_before", "cost_item"], [output]),
    ]
    graph.node.extend(nodes)


def _outer(model: Any) -> None:
    graph = model.graph
    ones = np.full((3_000, 1), 1e-4, np.float32)
    graph.initializer.append(numpy_helper.from_array(ones, "tall"))
    graph.initializer.append(numpy_helper.from_array(ones.T.copy(), "wide"))
    kind = {"to": TensorProto.FLOAT}
    graph.node.append(helper.make_node("Cast", ["input_ids"], ["cost_ids"], **kind))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int64), "cost_first"))
    graph.node.append(helper.make_node("Gather", ["cost_ids", "cost_first"], ["cost_r"], axis=0))
    graph.node.append(helper.make_node("Gather", ["cost_r", "cost_first"], ["cost_i"], axis=0))
    graph.node.append(helper.make_node("Mul", ["tall", "cost_i"], ["cost_tall"]))
    graph.node.append(helper.make_node("MatMul", ["cost_tall", "wide"], ["product_0"]))
    for index in range(12):
        name = f"product_{index}"
        graph.node.append(helper.make_node("MatMul", [name, name], [f"product_{index + 1}"]))
    keep(model, "product_12")


def _many(count: int) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        kind = {"to": TensorProto.FLOAT}
        model.graph.node.append(helper.make_node("Cast", ["input_ids"], ["many_0"], **kind))
        for index in range(count):
            name = f"many_{index}"
            model.graph.node.append(helper.make_node("Mul", [name, name], [f"many_{index + 1}"]))
        keep(model, f"many_{count}")

    return change


def _broadcast(model: Any) -> None:
    """A column times a row, without a product of matrices."""
    graph = model.graph
    graph.initializer.append(
        numpy_helper.from_array(np.ones((20_000, 1), np.float32), "cost_column")
    )
    graph.initializer.append(
        numpy_helper.from_array(np.ones((1, 20_000), np.float32), "cost_row_1")
    )
    graph.node.append(helper.make_node("Mul", ["cost_column", "cost_row_1"], ["table"]))
    keep(model, "table")


def _gathered(model: Any) -> None:
    """Many rows of a small table."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.ones((1, 16_000), np.float32), "rows"))
    zeros = np.zeros(40_000, np.int64)
    graph.initializer.append(numpy_helper.from_array(zeros, "which"))
    graph.node.append(helper.make_node("Gather", ["rows", "which"], ["gathered"], axis=0))
    keep(model, "gathered")


BOTH = {
    "doubling a constant": _doubled("Concat", True),
    "doubling an input": _doubled("Concat", False),
    "an outer product and 12 products": _outer,
    "20,000 nodes": _many(20_000),
    "a column times a row": _broadcast,
    "rows gathered": _gathered,
}


def _pad(model: Any) -> None:
    graph = model.graph
    graph.initializer.append(
        numpy_helper.from_array(np.array([0, 0, 0, 1 << 29], np.int64), "pads")
    )
    kind = {"to": TensorProto.FLOAT}
    graph.node.append(helper.make_node("Cast", ["input_ids"], ["cost_ids"], **kind))
    graph.node.append(helper.make_node("Pad", ["cost_ids", "pads"], ["padded"]))
    keep(model, "padded")


ROUTER = {"a padding of 2^29": _pad}


def _expanded(operator: str) -> Callable[[Any], object]:
    """A shape made of the input's, squared and more."""

    def change(model: Any) -> None:
        graph = model.graph
        big = np.array([1 << 29], np.int64)
        graph.initializer.append(numpy_helper.from_array(big, "cost_big"))
        graph.initializer.append(numpy_helper.from_array(np.array(1 << 29, np.int64), "cost_end"))
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "cost_from"))
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "cost_by"))
        inputs = {
            "Range": ["cost_from", "cost_end", "cost_by"],
            "ConstantOfShape": ["cost_big"],
            "Expand": ["cost_by", "cost_big"],
        }[operator]
        graph.node.append(helper.make_node(operator, inputs, ["expanded"]))
        kind = {"to": TensorProto.FLOAT}
        graph.node.append(helper.make_node("Cast", ["expanded"], ["cost_float"], **kind))
        graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "cost_axis"))
        graph.node.append(
            helper.make_node("Unsqueeze", ["cost_float", "cost_axis"], ["expanded_row"])
        )
        keep(model, "expanded_row")

    return change


def as_albert(change: Callable[[Any], object]) -> Attack:
    """A router that claims the architecture with operators on shapes."""

    def constant(model: Any) -> None:
        width = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
        del model.graph.node[:], model.graph.initializer[:]
        features = numpy_helper.from_array(np.ones((1, width), np.float32), "cost_features")
        model.graph.initializer.append(features)
        node = helper.make_node("Identity", ["cost_features"], [model.graph.output[0].name])
        model.graph.node.append(node)

    def attack(folder: Path) -> None:
        replaced("router.onnx", on_model(constant))(folder)
        edited(lambda m: m["router"].update(architecture="albert"))(folder)
        replaced("router.onnx", on_model(change))(folder)

    return attack


ATTACKS: dict[str, Attack] = {
    f"{what}: {name}": replaced(file, on_json(change))
    for what, file in (
        ("tokenizer", "tokenizer.json"),
        ("router tokenizer", "router_tokenizer.json"),
    )
    for name, change in TOKENIZERS.items()
    if (what, name) != ("router tokenizer", "a token of four megabytes")
}
ATTACKS |= {f"template: {name}": templated(text) for name, text in TEMPLATES.items()}
ATTACKS |= {
    f"{what}: {name}": replaced(file, on_model(change))
    for what, file in (("backbone", "backbone.onnx"), ("router", "router.onnx"))
    for name, change in BOTH.items()
}
ATTACKS |= {f"router: {name}": replaced("router.onnx", on_model(c)) for name, c in ROUTER.items()}
ATTACKS |= {
    f"albert: {name}": as_albert(_expanded(name)) for name in ("Range", "ConstantOfShape", "Expand")
}
