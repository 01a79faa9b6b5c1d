"""Tools for tests; short, since the small bundle reads a token a byte."""

from __future__ import annotations

from typing import Any

CLOCK: dict[str, Any] = {
    "name": "tell",
    "parameters": {
        "properties": {"at": {"type": "integer", "minimum": 0, "maximum": 23}},
        "required": ["at"],
        "additionalProperties": False,
    },
}
WEATHER: dict[str, Any] = {
    "name": "sky",
    "description": "Weather",
    "parameters": {
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
