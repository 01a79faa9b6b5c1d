"""Checks of option values."""

from __future__ import annotations

import math
import numbers

from dlp_edge.errors import UsageError


def check_number(name: str, value: object, whole: bool = False) -> None:
    """Raises UsageError unless the value is a finite number, or an integer if `whole`."""
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind) or not _is_finite(value):
        raise UsageError(f"{name} is {value!r}", f"Give a {'whole' if whole else 'finite'} number")


def check_positive(name: str, value: object) -> None:
    """Raises UsageError unless the value is an integer of at least 1."""
    check_number(name, value, whole=True)
    if value < 1:  # type: ignore[operator]
        raise UsageError(f"{name} is {value}", "Choose at least 1")


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False
