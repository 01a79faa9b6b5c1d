"""Which colour stands for which adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PySide6.QtGui import QColor

# The colours lie thinly over the window's own background: black text stays readable on them in a
# light palette, white text in a dark one.
OPACITY = 0.3


def colour(names: Sequence[str], name: str) -> QColor:
    """An adapter's own colour; the hues of all are spread evenly."""
    return QColor.fromHslF((0.58 + names.index(name) / len(names)) % 1, 0.7, 0.55)


def blend(names: Sequence[str], fusion: Mapping[str, float]) -> QColor:
    """The adapters' colours mixed by their weights; nothing at all for the base model."""
    total = sum(fusion.values())
    if not total:
        return QColor(0, 0, 0, 0)
    shares = [(colour(names, name), weight / total) for name, weight in fusion.items()]
    return QColor.fromRgbF(
        min(1, sum(share * own.redF() for own, share in shares)),
        min(1, sum(share * own.greenF() for own, share in shares)),
        min(1, sum(share * own.blueF() for own, share in shares)),
        OPACITY,
    )


def label(fusion: Mapping[str, float]) -> str:
    """`sql 0.53 + email 0.47`, `sql`, or `base`."""
    if len(fusion) <= 1:
        return next(iter(fusion), "base")
    ordered = sorted(fusion.items(), key=lambda item: -item[1])
    return " + ".join(f"{name} {weight:.2f}" for name, weight in ordered)
