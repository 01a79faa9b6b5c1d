"""Chat templates that would cost without bound: what stands for a long text, work between the
charges, what the compiler makes of a source."""

from __future__ import annotations

from tests.security.attacks.costs import MB, REFERENCES, SAME, templated
from tests.security.attacks.forge import Attack

_NAME = "m" * 100_000
_QUOTES = MB.replace("'ab'", "'\"&'")
_LOCALS = "".join(f"{{% set v{i:03d}{'x' * 350}=1 %}}" for i in range(500))
_RANGE = "{% set r = range(100000) %}{% for i in r %}"


def _nested(start: str, count: int, middle: str, end: str) -> str:
    return start * count + middle + end * count


def _doubling(items: str, times: int) -> str:
    return (
        f"{{% set n = namespace(r={items}) %}}{{% for i in range({times}) %}}"
        "{% set n.r = n.r + n.r %}{% endfor %}"
    )


def _repeated(character: str, doublings: int) -> str:
    return (
        f"{{% set n = namespace(a='{character}') %}}{{% for i in range({doublings}) %}}"
        "{% set n.a = n.a + n.a %}{% endfor %}"
    )


TEMPLATES = {
    **{
        f"a namespace: {name}": REFERENCES + body
        for name, body in {
            "output": "{{ n }}",
            "string": "{{ (n|string)|length }}",
            "upper": "{{ (n|upper)|length }}",
            "tilde": "{{ (n ~ n)|length }}",
            "in a list": "{{ [n]|string|length }}",
            "replace": "{{ n|replace('q', 'r')|length }}",
            "escape": "{{ n|e|length }}",
            "title": "{{ n|title|length }}",
            "join": "{{ [n, n]|join|length }}",
        }.items()
    },
    "a namespace in itself": "{% set n = namespace() %}{% set n.x = n %}{{ n }}",
    **{
        f"macros of a long name: {name}": f"{{% macro {_NAME}() %}}{{% endmacro %}}"
        + _doubling(f"[{_NAME}]", 14)
        + body
        for name, body in {"string": "{{ n.r|string }}", "join": "{{ n.r|join }}"}.items()
    },
    "escaping": _QUOTES + "{% autoescape true %}" + "{{ a }}" * 12 + "{% endautoescape %}",
    "escaping what is added": _QUOTES + "{% autoescape true %}{% macro m() %}{% endmacro %}"
    "{{ (m() + a * 1)|length }}{% endautoescape %}",
    "blocks that repeat names": "{% for q in [1] %}"
    + _LOCALS
    + "".join(f"{{% block b{i} scoped %}}{{% endblock %}}" for i in range(1_200))
    + "{% endfor %}",
    "a block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "slices reversed": SAME + _RANGE + "{% set x = a[::-1] %}{% endfor %}",
    "slices in a row": SAME + "{% set x = a[::-1] %}" * 2_000,
    "slices of a list": SAME + "{% set l = range(90000)|list %}" + _RANGE + "{{ l[1:]|first }}"
    "{% endfor %}",
    "a loop of nothing": _RANGE + "{% for j in r %}{% endfor %}{% endfor %}",
    "a macro in itself": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "a tree of macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}"
    "{% endmacro %}{{ m(100) }}",
    "a caller in itself": "{% macro m() %}{{ caller() }}{% endmacro %}{% macro k() %}"
    "{% call m() %}{{ k() }}{% endcall %}{% endmacro %}{{ k() }}",
    "arguments by the thousand": "{% macro m() %}{{ varargs|length }}{% endmacro %}"
    "{% set q = range(90000)|list %}" + _RANGE + "{{ m(*q) }}{% endfor %}",
    "defaults by the thousand": f"{{% macro m({','.join(f'a{i}=1' for i in range(2_000))}) %}}"
    "{% endmacro %}" + _RANGE + "{{ m() }}{% endfor %}",
    "ranges searched": _RANGE + "{{ 1.5 in r }}{% endfor %}",
    "ranges sorted": _RANGE + "{{ r|max }}{% endfor %}",
    "ranges compared": _RANGE + "{{ r|list == r|list }}{% endfor %}",
    "a needle with a mark": SAME + "{% set k = a[:250000] ~ 'b' ~ a[:250000] %}"
    "{% for i in range(50) %}{{ a.find(k) }}{{ a.count(k) }}{{ k in a }}{% endfor %}",
    "pieces kept": _repeated("ab ", 16)
    + "".join(f"{{% set v{i} = n.a.split(' ') %}}" for i in range(60)),
    "numbers kept": "".join(
        f"{{% set v{i} = range(1000, 50000)|map('float')|list %}}" for i in range(60)
    ),
    "private characters": _repeated("\U000e0001", 21) + "{{ [n.a]|string|length }}",
    "capitals of three letters": _repeated("\u0390", 21) + "{{ n.a|upper|length }}",
    "a wide character added": _repeated("a", 23) + "{{ (n.a + '\U0001f600')|length }}",
    "a wide character put in": _repeated("a", 23) + "{{ n.a.replace('a', '\U0001f600', 1) }}",
    "texts of an attribute": _repeated("a.", 20) + "{{ [{}]|map(attribute=n.a)|list }}",
    "replaced in references": SAME + _doubling("[a]", 12) + "{{ n.r|map('replace', 'a', 'bb') }}"
    "{{ n.r|map('replace', 'a', 'bb')|list }}",
    "sorted by one attribute often": SAME + _doubling("[{'k': a}]", 14)
    + "{{ n.r|sort(attribute='k,k,k,k')|length }}",
    **{
        f"source of {name}": text
        for name, text in {
            "macros": "{% macro a() %}{% endmacro %}" * 2_200,
            "conditions": "{% if a %}{% endif %}" * 2_800,
            "loops": "{% for a in b %}{% endfor %}" * 2_000,
            "calls": "{{ a() }}" * 3_300,
            "comparisons": "{{ a" + " < a" * 9_000 + " }}",
            "pairs": "{{ {" + "1:1," * 4_900 + "} }}",
            "sums": "{{ a" + " + a" * 9_000 + " }}",
            "negations": "{{ " + "not " * 19_000 + "a }}",
            "signs": "{{ " + "-" * 19_000 + "a }}",
            "parentheses": "{{ " + _nested("(", 9_000, "a", ")") + " }}",
            "lists in lists": "{{ " + _nested("[", 9_000, "", "]") + " }}",
            "conditions in conditions": _nested("{% if a %}", 2_000, "", "{% endif %}"),
            "loops in loops": _nested("{% for a in b %}", 1_500, "", "{% endfor %}"),
            "alternatives": "{% if a %}" + "{% elif b %}" * 4_000 + "{% endif %}",
            "attributes": "{{ a" + ".b" * 9_000 + " }}",
            "slices": "{{ a" + "[:]" * 4_900 + " }}",
        }.items()
    },
    **{
        f"a width of a billion: {call}": "{{ " + call + " }}"
        for call in (
            "'%1000000000d' % 1", "'{:1000000000}'.format(1)", "'%1000000000d'|format(1)",
            "'a'|center(1000000000)", "'a'.center(1000000000)", "'a'.zfill(1000000000)",
            "'a'|indent(1000000000)", "'a' * 1000000000", "[1] * 1000000000", "9 ** 9 ** 9",
            "[1]|batch(1000000000, 1)|list", "strftime_now('%999999999Y')",
        )
    },
}  # fmt: skip

ATTACKS: dict[str, Attack] = {f"template: {name}": templated(t) for name, t in TEMPLATES.items()}
