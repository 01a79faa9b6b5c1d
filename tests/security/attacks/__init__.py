"""Bad bundles and bad adapters: each made from a good one by a small function.

A bundle attack changes a copy of a good bundle and, unless the manifest is the point, makes sizes,
hashes and checksum right again, so that it gets as far as it can.
"""

from __future__ import annotations

from dlp_edge.errors import AdapterError, BundleError
from tests.security.attacks import adapters, graphs, manifests, tensors, texts
from tests.security.attacks.forge import Attack

_BUNDLES = {**manifests.ATTACKS, **tensors.ATTACKS, **graphs.ATTACKS, **texts.ATTACKS}

# (name, what it does to a copy of a good bundle's folder, the error that loading gives)
ATTACKS: list[tuple[str, Attack, type[Exception]]] = [
    (name, attack, BundleError) for name, attack in _BUNDLES.items()
]
# The same for the folder of a PEFT adapter.
ADAPTER_ATTACKS: list[tuple[str, Attack, type[Exception]]] = [
    (name, attack, AdapterError) for name, attack in adapters.ATTACKS.items()
]
